"""A block of a transformer layer under a dynamic method: choose, slice, run the stock code, remember."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pp_lightning.blocks import Block, BlockKey
from pp_lightning.caches import without_cache
from pp_lightning.functional.compensation import channel_mean, update_mean_
from pp_lightning.functional.linear import wants_rows
from pp_lightning.functional.moments import TokenPositions, placed_second_moment, second_moment, update_history_
from pp_lightning.functional.probe import Arguments, probe_arguments, token_sensitivity
from pp_lightning.functional.scores import energy_weight_norm
from pp_lightning.functional.selection import keep_best, unit_channels
from pp_lightning.interfaces import current_forward, effective_weight
from pp_lightning.methods.dynamic import AnyProbe, DynamicMethod
from pp_lightning.pruned.cached_heads import CachedHeads
from pp_lightning.pruned.choice import Choice, ExecutionPlan
from pp_lightning.pruned.context import ModelContext
from pp_lightning.pruned.conversations import Conversation
from pp_lightning.pruned.inputs import BatchInputs, Earlier, Result, State
from pp_lightning.pruned.projection import Product
from pp_lightning.pruned.recomputing import Known, Recomputing
from pp_lightning.pruned.refreshing import RecentInputs
from pp_lightning.pruned.runner import BlockRunner
from pp_lightning.pruned.slices import Slice


class Ready(NamedTuple):
    """How the stock code runs a batch.

    Attributes:
        does: what each projection does, the output last.
        kept: (K,) int64, the units that they do it on; None is all, up to the output.
    """

    does: Sequence[Product]
    kept: Tensor | None


class PrunedBlock(nn.Module):
    """Hangs on the module of a block as ``pruner``, and stands in for its ``forward``. It owns no weight.

    The stock code runs twice: on the probe, with all weights, up to the output projection, whose input is what scores
    are made of; then on the whole batch, with slices of the kept units in its projections. This holds the history
    (P_max, C), the running mean (C,) and the constant part of the scores (C,), as buffers that are not part of the
    checkpoint. A block without a module of its own has it on the layer.

    ``history`` (P_max, C) and the running ``mean`` (C,), both float32, are what it starts from; None for methods
    without. ``norm`` is the one in front of the block; None where the residual itself enters.

    Attributes:
        cached_heads: what a cache holds of an attention block; None of an MLP.
    """

    history: Tensor | None
    mean: Tensor | None
    weight_norm: Tensor
    input_norm: Tensor | None

    def __init__(
        self,
        runner: BlockRunner,
        index: int,
        number: int,
        method: DynamicMethod,
        context: ModelContext,
        recomputing: Recomputing,
        norm: nn.Module | None,
        history: Tensor | None,
        mean: Tensor | None,
    ) -> None:
        super().__init__()
        self.runner = runner
        self.block = runner.modules.block
        self.index = index
        self.key: BlockKey = (index, self.block)
        self.number = number
        self.units = runner.units
        self.method = method
        self.context = context
        self.recomputing = recomputing
        self._mixes_tokens = self.block is Block.ATTENTION
        self.cached_heads = CachedHeads(index, self.units.number) if self._mixes_tokens else None
        self._norm = (norm,)  # in a tuple: the layer owns it, not this module
        weight = runner.modules.scored_weight
        self.register_buffer("weight_norm", method.weight_norm(weight), persistent=False)
        weighed = method.weighs_tokens and not self._mixes_tokens
        self.register_buffer("input_norm", self._input_norm() if weighed else None, persistent=False)
        for name, start in (("history", history), ("mean", mean)):
            self.register_buffer(name, None if start is None else start.to(weight.device), persistent=False)

    def _input_norm(self) -> Tensor:
        """``sum W^2`` over all rows of the input projections: what each feature counts for, (D,) float32."""
        modules = (self.runner.modules.projection(name) for name in self.runner.modules.inputs)
        weights = [one.weight if self.runner.modules.is_linear(one) else effective_weight(one) for one in modules]
        return torch.stack([energy_weight_norm(weight) for weight in weights]).sum(0)

    @property
    def norm(self) -> nn.Module | None:
        """The norm in front."""
        return self._norm[0]

    @property
    def state(self) -> State:
        """What it remembers now."""
        return State(self.history, self.mean)

    # What the layer calls.

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block on a batch. Traces into one graph."""
        runner = self.runner
        given = {**dict(zip(runner.names, args, strict=False)), **kwargs}
        hidden = given.pop(runner.names[0])
        ready = self._ready(hidden, given)
        return runner.run(hidden, given) if ready is None else runner.run(hidden, given, *ready)

    def begin(self, hidden: Tensor) -> Tensor:
        """The same for a block without a module of its own: what its first projection gives."""
        ready = self._ready(hidden, {})
        if ready is None:
            return self.runner.inputs[0].stock(hidden)
        enter, self.context.leaving = ready.does
        return enter(hidden)

    def end(self, states: Tensor) -> Tensor:
        """And what its output projection gives."""
        leave, self.context.leaving = self.context.leaving, None
        return self.runner.output.stock(states) if leave is None else leave(states)

    def see_residual(self, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Forward pre-hook of the norm in front: its input is what ranks the probe."""
        inputs = self.context.batch
        if inputs is not None and not inputs.decoding:
            inputs.residuals[self._place(inputs)] = args[0]

    # One batch.

    def follow(self) -> None:
        """Before the layers run: follow adapters and checkpointing, which come and go."""
        self.recomputing.attach()
        if self.runner.rebind():
            self.weight_norm.copy_(self.method.weight_norm(self.runner.modules.scored_weight))
            if self.input_norm is not None:
                self.input_norm.copy_(self._input_norm())

    def _ready(self, hidden: Tensor, given: Arguments) -> Ready | None:
        """Make ready for a batch: on the choice that is held, or on one that is made now.

        ``hidden`` is (B, S, D) or (B * S, D), ``given`` the other arguments of the block's module.
        """
        runner, inputs = self.runner, self.context.batch
        known = self.recomputing.known(self.block)
        if known is not None:
            return self._ready_again(hidden, known)
        if inputs is None:
            return None
        if inputs.decoding:
            choice, weights = self._held(hidden, inputs)
            return Ready(runner.narrowed(choice, weights), choice.kept)
        residual = inputs.residuals.pop(self._place(inputs), hidden)
        if inputs.dense:
            return Ready(runner.widened(partial(self._choose_by_all, inputs)), None)
        plan = self.plan(inputs)
        source = hidden
        if hidden.dim() != 3:
            source, residual = inputs.as_batch(hidden), inputs.as_batch(residual)
        if plan.shares and not self._mixes_tokens:  # token by token: the probe's states are among the batch's
            return Ready(runner.widened(partial(self._choose_late, source, residual, inputs, plan)), None)
        ahead = runner.whole_outputs(hidden) if plan.shares else None
        choice = self._choose(source, residual, given, inputs, plan, ahead)
        weights = self._sliced(choice, inputs, plan)
        does = runner.narrowed(choice, weights, ahead)
        does[-1] = self._remembering(does[-1], inputs, choice)
        return Ready(does, choice.kept)

    def _held(self, hidden: Tensor, inputs: BatchInputs) -> tuple[Choice, Slice]:
        """What a batch that continues a cache runs on."""
        one = inputs.conversation
        assert one is not None
        if one.recent is not None and not self._mixes_tokens:
            if inputs.since is not None and inputs.since.of(self.number) is not None:
                self._choose_again(inputs.since, one)
            one.recent.add(self.number, inputs.as_batch(hidden))
        return self.choice_of(one), one.slice_of(self.number, self.runner.slices)

    @torch.no_grad()
    def _choose_again(self, since: RecentInputs, one: Conversation) -> None:
        """Choose channels by the tokens since the last choice, which run on all of them."""
        seen, (history, mean) = since.of(self.number), self.state
        assert seen is not None
        if history is not None:
            history = since.positions(seen.shape[1], history)
        states = self.runner.states(seen, {})
        one.choices[self.number] = self._settled(self._best(states, None, None, State(history, mean)), states.dtype)
        if one.held is not None:
            one.held[self.number] = None  # sliced anew

    def _sliced(self, choice: Choice, inputs: BatchInputs, plan: ExecutionPlan) -> Slice:
        """The weights for a batch, left for decoding where it has asked for that."""
        slices = self.runner.slices
        if not plan.leaves:
            return slices.of(choice, inputs.buffer, output_alone=plan.shares)
        weights = slices.of(choice, inputs.rooms[self._place(inputs)])
        if inputs.plans is None and inputs.conversation is not None and inputs.conversation.held is not None:
            inputs.conversation.held[self.number] = weights
        return weights

    def _ready_again(self, hidden: Tensor, known: Known) -> Ready:
        """The operations of an earlier pass once more, in their order: nothing is chosen, nothing remembered."""
        runner, (choice, shares) = self.runner, known
        if shares and not self._mixes_tokens:
            return Ready(runner.widened(partial(self._leave_again, choice)), None)
        ahead = runner.whole_outputs(hidden) if shares else None
        return Ready(runner.narrowed(choice, runner.slices.of(choice, output_alone=shares), ahead), choice.kept)

    def _leave_again(self, choice: Choice, states: Tensor) -> Tensor:
        leave = self.runner.leaving(choice, self.runner.slices.of(choice, output_alone=True))
        return leave(states.index_select(-1, choice.kept))

    def plan(self, inputs: BatchInputs) -> ExecutionPlan:
        """How a batch is run: the same for all batches of one shape."""
        if inputs.plans is not None:
            return inputs.plans[self.block]
        leaves = self.key in inputs.rooms and not wants_rows(self.runner.output.module.weight)
        key = (self.runner.keep, self.units.number, leaves)
        return inputs.known_plans.get(key) or inputs.plan(self.method, *key)

    def _place(self, inputs: BatchInputs) -> Any:
        """Where this block finds, and puts, what is its own."""
        return self.key if inputs.plans is None else self.block

    @torch.no_grad()
    def _choose(
        self,
        source: Tensor,
        residual: Tensor,
        given: Arguments,
        inputs: BatchInputs,
        plan: ExecutionPlan,
        ahead: dict[str, Tensor] | None,
    ) -> Choice:
        """Run the probe ahead and choose by it, on a stream of its own where it need not wait.

        ``source`` and ``residual`` are (B, S, D): what enters the block, and what ranks the probe. ``ahead`` are
        outputs of the input projections on the batch with all weights, by name; None runs them.
        """
        if self.method.probe_source == "previous":
            earlier = self._earlier(inputs)
            if earlier is not None:
                return self._choose_ahead(earlier, given, inputs, plan)
        probe = self._probe(source, residual, inputs, plan)
        part = source if probe is None else probe.take(source)
        if ahead is not None and probe is not None:
            ahead = {name: probe.take(states) for name, states in ahead.items()}
        if given:
            given = probe_arguments(without_cache(given), probe)
        return self._choice(self.runner.states(part, given, ahead), probe, inputs, shared=plan.shares)

    def _choose_ahead(self, earlier: Earlier, given: Arguments, inputs: BatchInputs, plan: ExecutionPlan) -> Choice:
        """Choose by a probe of an earlier residual, beside what the current stream does where there is another one."""

        def choose() -> Choice:
            residual = earlier.residual
            if self.method.ranks_by_input or self.input_norm is not None:
                source = self._normed(residual)
                probe = self._probe(source, residual, inputs, plan)
                part = source if probe is None else probe.take(source)
            else:  # the norm of all tokens would take longer than the probe
                probe = self._probe(residual, residual, inputs, plan)
                part = self._normed(residual if probe is None else probe.take(residual))
            return self._choice(self.runner.states(part, probe_arguments(without_cache(given), probe)), probe, inputs)

        side = self.context.side_stream(earlier.residual.device)
        return choose() if side is None else side.join(side.start(earlier.since or side.moment(), choose))

    def _normed(self, residual: Tensor) -> Tensor:
        """What enters the block, from a residual (b, s, D) in front of its norm."""
        normed: Tensor = residual if self.norm is None else current_forward(self.norm)(residual)
        return normed

    def _choose_late(
        self, source: Tensor, residual: Tensor, inputs: BatchInputs, plan: ExecutionPlan, states: Tensor
    ) -> Tensor:
        """The output of a batch that is chosen for by all its states (B, S, C) or (B * S, C)."""
        with torch.no_grad():
            probe, whole = self._probe(source, residual, inputs, plan), inputs.as_batch(states)
            choice = self._choice(whole if probe is None else probe.take(whole), probe, inputs, shared=True)
        leave = self.runner.leaving(choice, self._sliced(choice, inputs, plan))
        return self._remembering(leave, inputs, choice)(states.index_select(-1, choice.kept))

    def _probe(self, source: Tensor, residual: Tensor, inputs: BatchInputs, plan: ExecutionPlan) -> AnyProbe | None:
        """The part of the batch that runs ahead; None is all of it."""
        places = inputs.places if inputs.places is None else inputs.places_on(source.device)
        real = None if places is None else places.real
        samples = (
            inputs.samples
            if inputs.samples is None
            else inputs.samples_of(self.index, self._mixes_tokens, source.device)
        )
        weight = self.input_norm
        importance = inputs.attended if weight is None else token_sensitivity(source, weight)
        return self.method.select(
            residual,
            source,
            real,
            plan.probe_sizes,
            samples=samples,
            importance=importance,
            mixes_tokens=self._mixes_tokens,
        )

    def _choice(self, states: Tensor, probe: AnyProbe | None, inputs: BatchInputs, *, shared: bool = False) -> Choice:
        """The units to keep for this batch, and what the others contribute to it on average.

        ``states`` (b, s, C) are what reaches the output projection on the probe; ``shared`` says whether probe and
        batch come from one projection.
        """
        places = inputs.places if inputs.places is None else inputs.places_on(states.device)
        place = self._place(inputs)
        choice = self._settled(self._best(states, probe, places, inputs.states[place]), states.dtype)
        inputs.results[place] = Result(choice)
        self.recomputing.note(self.block, Known(choice, shared))
        return choice

    def _best(self, states: Tensor, probe: AnyProbe | None, places: TokenPositions | None, state: State) -> Choice:
        """The units with the best scores."""
        energy, means = self.method.observe(states, probe, places, *state)
        scores = self.method.unit_scores(energy, self.weight_norm, self.units.channels)
        return Choice(keep_best(scores, self.runner.keep), mean=means)

    def _settled(self, choice: Choice, dtype: torch.dtype = torch.float32) -> Choice:
        """With what is restored: one product with the output matrix, which a dense prompt leaves to the next token.

        ``dtype`` is that of states, which an output projection that is more than a matrix has to be given.
        """
        if choice.mean is None:
            return choice
        channels = unit_channels(choice.kept, self.units.channels)
        return Choice(choice.kept, self.runner.output.restored(choice.mean, channels, dtype))

    @torch.no_grad()
    def choice_of(self, one: Conversation) -> Choice:
        """What a conversation goes on with."""
        choice = one.choices[self.number] = self._settled(one.choices[self.number])
        return choice

    def _choose_by_all(self, inputs: BatchInputs, states: Tensor) -> Tensor:
        """The output of a prompt that runs dense, whose own states (B, S, C) or (B * S, C) choose for what follows."""
        with torch.no_grad():
            seen, place = inputs.as_batch(states), self._place(inputs)
            places = inputs.places if inputs.places is None else inputs.places_on(states.device)
            choice = self._best(seen, None, places, inputs.states[place])
            if not self.runner.output.is_linear:
                choice = self._settled(choice, states.dtype)
            inputs.results[place] = Result(choice)  # histories stay: all channels' take a tenth of a short prompt
        return self.runner.output.stock(states)

    def _remembering(self, leave: Product, inputs: BatchInputs, choice: Choice) -> Product:
        """The output of the kept units, where histories move with a look at what reaches it."""
        if not inputs.remember or self.history is None:
            return leave
        return partial(self._leave_remembered, leave, inputs, choice)

    def _leave_remembered(self, leave: Product, inputs: BatchInputs, choice: Choice, states: Tensor) -> Tensor:
        """The output of the kept units, whose moments are noted for when the batch is done.

        ``states`` (B, S, K * w) or (B * S, K * w) enter the output matrix.
        """
        with torch.no_grad():
            inputs.results[self._place(inputs)] = self._result(choice, inputs.as_batch(states), inputs)
        return leave(states)

    def _result(self, choice: Choice, states: Tensor, inputs: BatchInputs) -> Result:
        """What a batch leaves whose states (B, S, K * w) reach the output."""
        places = inputs.places if inputs.places is None else inputs.places_on(states.device)
        if places is None:
            moment, present = second_moment(states), None
        else:
            moment, count = placed_second_moment(states, places)
            present = count > 0
        mean = None if self.mean is None else channel_mean(states, None if places is None else places.real)
        return Result(choice, moment, present, mean)

    def _earlier(self, inputs: BatchInputs) -> Earlier | None:
        """The residual that a parallel probe is taken from."""
        earlier = inputs.middle if self._mixes_tokens else inputs.entered
        return None if earlier is None else earlier.on(self.weight_norm.device)

    # Between two batches.

    def remember(self, result: Result, finite: Tensor, *, in_place: bool) -> None:
        """Move the history, and the running mean, by a batch.

        If not ``finite``, nothing moves. ``in_place=False`` leaves the tensors as they are, for batches that still read
        them, and makes new ones.
        """
        history, mean, momentum = self.history, self.mean, self.method.momentum
        if history is None or result.moment is None:
            return
        channels = unit_channels(result.choice.kept, self.units.channels)
        finite = finite.to(history.device)
        if not in_place:
            history, mean = history.clone(), None if mean is None else mean.clone()
        present = finite[None] if result.present is None else result.present & finite
        update_history_(history, result.moment, channels, momentum, present)
        if mean is not None and result.mean is not None:
            update_mean_(mean, result.mean, channels, momentum, finite)
        if not in_place:
            self.history, self.mean = history, mean

    def _apply(self, fn: Any, recurse: bool = True) -> "PrunedBlock":
        """Follow the model to its device, but stay in float32: a history in half precision stalls."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        self.context.held.forget()
        return self
