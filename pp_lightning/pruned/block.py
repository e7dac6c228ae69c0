"""A block of a transformer layer under a dynamic method: choose, slice, run the stock code, remember."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pp_lightning.blocks import Block
from pp_lightning.functional.compensation import channel_mean, update_mean_
from pp_lightning.functional.linear import wants_rows
from pp_lightning.functional.moments import placed_second_moment, sum_of_squares, update_history_
from pp_lightning.functional.probe import Arguments, probe_arguments
from pp_lightning.functional.selection import keep_best, unit_channels
from pp_lightning.interfaces import current_forward
from pp_lightning.methods.dynamic import AnyProbe, DynamicMethod
from pp_lightning.pruned.choice import Choice, ExecutionPlan
from pp_lightning.pruned.context import ModelContext
from pp_lightning.pruned.inputs import BatchInputs, Earlier
from pp_lightning.pruned.projection import Product
from pp_lightning.pruned.recomputing import Known, Recomputing
from pp_lightning.pruned.runner import BlockRunner


class PrunedBlock(nn.Module):
    """Hangs on the module of a block as ``pruner``, and stands in for its ``forward``. It owns no weight.

    The stock code runs twice: on the probe, with all weights, up to the output projection, whose input is what scores
    are made of; then on the whole batch, with slices of the kept units in its projections. This holds the history
    (P_max, C), the constant part of the scores (C,) and the units kept for the last batch (K,), as buffers that are not
    part of the checkpoint. A block without a module of its own has it on the layer.

    Args:
        runner: of the stock code.
        index: of the layer.
        method: the policy.
        context: shared by the blocks of the model.
        recomputing: shared by the blocks of the layer.
        norm: the norm in front of the block; None where the residual itself enters.
        history: (P_max, C) float32 to start from, or None for methods without.
        mean: (C,) float32, the running mean to start from, or None for methods without.

    Attributes:
        block: attention or MLP.
        units: of the block.
        decodes: whether choices are held for decoding. From then on, prompts leave their slices for it.
    """

    history: Tensor | None
    mean: Tensor | None
    weight_norm: Tensor
    kept: Tensor
    restored: Tensor | None

    def __init__(
        self,
        runner: BlockRunner,
        index: int,
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
        self.units = runner.units
        self.method = method
        self.context = context
        self.decodes = False
        self.recomputing = recomputing
        self._mixes_tokens = self.block is Block.ATTENTION
        self._norm = (norm,)  # in a tuple: the layer owns it, not this module
        self._residual: tuple[Tensor, ...] = ()
        weight = runner.modules.scored_weight
        self.register_buffer("weight_norm", method.weight_norm(weight), persistent=False)
        for name, start in (("history", history), ("mean", mean)):
            self.register_buffer(name, None if start is None else start.to(weight.device), persistent=False)
        self.register_buffer("kept", torch.arange(runner.keep, device=weight.device), persistent=False)
        restored = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device)
        self.register_buffer("restored", restored if method.restores_means else None, persistent=False)

    @property
    def norm(self) -> nn.Module | None:
        """The norm in front."""
        return self._norm[0]

    @property
    def last(self) -> Choice:
        """What the last batch was run on."""
        return Choice(self.kept, self.restored)

    # What the layer calls.

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block on a batch. Traces into one graph."""
        runner = self.runner
        given = {**dict(zip(runner.names, args, strict=False)), **kwargs}
        hidden = given.pop(runner.names[0])
        return runner.run(hidden, given) if self._prepare(hidden, given) else runner.stock(hidden, given)

    def begin(self, hidden: Tensor) -> Tensor:
        """The same for a block without a module of its own: what its first projection gives."""
        runner = self.runner
        return runner.begin(hidden) if self._prepare(hidden, {}) else runner.inputs[0].stock(hidden)

    def see_residual(self, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Forward pre-hook of the norm in front: its input is what ranks the probe."""
        inputs = self.context.batch
        if inputs is not None and not inputs.decoding:
            self._residual = (args[0],)

    # One batch.

    def begin_batch(self) -> None:
        """Before the layers run: follow adapters and checkpointing, which come and go."""
        self.recomputing.attach()
        if self.runner.rebind():
            self.weight_norm.copy_(self.method.weight_norm(self.runner.modules.scored_weight))

    def _prepare(self, hidden: Tensor, given: Arguments) -> bool:
        """Make the projections ready for a batch: on the choice that is held, or on one that is made now.

        Args:
            hidden: (B, S, D) or (B * S, D), entering the block.
            given: the other arguments of the block's module.

        Returns:
            Whether there is a batch; without one the block is the stock one.
        """
        runner, slices, inputs = self.runner, self.runner.slices, self.context.batch
        known = self.recomputing.known(self.block)
        if known is not None:
            self._prepare_again(hidden, known)
            return True
        if inputs is None:
            return False
        if inputs.decoding:
            self.expect_decoding()
            runner.narrow(self.last, slices.hold(self.last))
            return True
        plan = self.plan(inputs)
        if plan.leaves or slices.held is not None or not slices.is_prepared:
            slices.prepare(leaves=plan.leaves)
        (residual,), self._residual = self._residual or (hidden,), ()
        source = hidden
        if hidden.dim() != 3:
            source, residual = inputs.as_batch(hidden), inputs.as_batch(residual)
        if plan.shares and not self._mixes_tokens:  # token by token: the probe's states are among the batch's
            runner.widen(partial(self._choose_late, source, residual, inputs, plan))
            return True
        ahead = runner.whole_outputs(hidden) if plan.shares else None
        choice = self._choose(source, residual, given, inputs, plan, ahead)
        weights = slices.of(choice, leaves=plan.leaves, output_alone=plan.shares)
        if plan.leaves and not torch.compiler.is_compiling():
            slices.held = weights
        runner.narrow(choice, weights, ahead)
        if inputs.remember and self.history is not None:
            leave = runner.output.does
            assert leave is not None
            runner.output.does = partial(self._leave_remembered, leave, inputs, choice.kept)
        return True

    def _prepare_again(self, hidden: Tensor, known: Known) -> None:
        """The operations of an earlier pass once more, in their order: nothing is chosen, nothing remembered."""
        runner, (choice, shares) = self.runner, known
        if shares and not self._mixes_tokens:
            runner.widen(partial(self._leave_again, choice))
            return
        ahead = runner.whole_outputs(hidden) if shares else None
        runner.narrow(choice, runner.slices.of(choice, output_alone=shares), ahead)

    def _leave_again(self, choice: Choice, states: Tensor) -> Tensor:
        self.runner.narrow(choice, self.runner.slices.of(choice, output_alone=True), output_alone=True)
        leave = self.runner.output.does
        assert leave is not None
        return leave(states.index_select(-1, choice.kept))

    def plan(self, inputs: BatchInputs) -> ExecutionPlan:
        """How a batch is run: the same for all batches of one shape."""
        if inputs.plans is not None:
            return inputs.plans[self.block]
        leaves = inputs.caching and self.decodes and not torch.is_grad_enabled()
        leaves = leaves and not wants_rows(self.runner.output.module.weight)
        key = (self.runner.keep, self.units.number, leaves)
        return inputs.known_plans.get(key) or inputs.plan(self.method, *key)

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

        Args:
            source: (B, S, D), entering the block.
            residual: (B, S, D), what ranks the probe.
            given: the other arguments of the block's module.
            inputs: of the batch.
            plan: of the batch.
            ahead: outputs of the input projections on the batch, by name, with all weights; None runs them.
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
            given = probe_arguments(given, probe)
        return self._choice(self.runner.states(part, given, ahead), probe, inputs, shared=plan.shares)

    def _choose_ahead(self, earlier: Earlier, given: Arguments, inputs: BatchInputs, plan: ExecutionPlan) -> Choice:
        """Choose by a probe of an earlier residual, beside what the current stream does where there is another one."""

        def choose() -> Choice:
            norm, residual = self.norm, earlier.residual
            source = residual if norm is None else current_forward(norm)(residual)
            probe = self._probe(source, residual, inputs, plan)
            part = source if probe is None else probe.take(source)
            return self._choice(self.runner.states(part, probe_arguments(given, probe)), probe, inputs)

        side = self.context.side_stream(earlier.residual.device)
        return choose() if side is None else side.join(side.start(earlier.since or side.moment(), choose))

    def _choose_late(
        self, source: Tensor, residual: Tensor, inputs: BatchInputs, plan: ExecutionPlan, states: Tensor
    ) -> Tensor:
        """The output of a batch that is chosen for by all its states (B, S, C) or (B * S, C)."""
        with torch.no_grad():
            probe, whole = self._probe(source, residual, inputs, plan), inputs.as_batch(states)
            choice = self._choice(whole if probe is None else probe.take(whole), probe, inputs, shared=True)
        runner = self.runner
        runner.narrow(choice, runner.slices.of(choice, output_alone=True), output_alone=True)
        leave = runner.output.does
        assert leave is not None
        kept = states.index_select(-1, choice.kept)
        remembers = inputs.remember and self.history is not None
        return self._leave_remembered(leave, inputs, choice.kept, kept) if remembers else leave(kept)

    def _probe(self, source: Tensor, residual: Tensor, inputs: BatchInputs, plan: ExecutionPlan) -> AnyProbe | None:
        """The part of the batch that runs ahead; None is all of it."""
        places = inputs.places if inputs.places is None else inputs.places_on(source.device)
        real = None if places is None else places.real
        lots = inputs.lots if inputs.lots is None else inputs.lots_of(self.index, self._mixes_tokens, source.device)
        return self.method.select(residual, source, real, plan.probe_sizes, lots=lots, mixes_tokens=self._mixes_tokens)

    def _choice(self, states: Tensor, probe: AnyProbe | None, inputs: BatchInputs, *, shared: bool = False) -> Choice:
        """The units to keep for this batch, and what the others contribute to it on average. Noted for decoding.

        Args:
            states: (b, s, C), what reaches the output projection on the probe.
            probe: where in the batch that is.
            inputs: of the batch.
            shared: whether probe and batch come from one projection.
        """
        places = inputs.places if inputs.places is None else inputs.places_on(states.device)
        energy, means = self.method.observe(states, probe, places, self.history, self.mean)
        scores = self.method.unit_scores(energy, self.weight_norm, self.units.channels)
        kept = keep_best(scores, self.runner.keep)
        restored = None
        if means is not None:
            channels = unit_channels(kept, self.units.channels)
            restored = self.runner.output.restored(means, channels, states.dtype)
            if self.restored is not None:
                self.restored.copy_(restored)
        self.kept.copy_(kept)
        choice = Choice(kept, restored)
        self.recomputing.note(self.block, Known(choice, shared))
        return choice

    def _leave_remembered(self, leave: Product, inputs: BatchInputs, kept: Tensor, states: Tensor) -> Tensor:
        """The output of the kept units, whose states move the history, and the running mean where there is one.

        Args:
            leave: the output matrix.
            inputs: of the batch.
            kept: (K,) int64, units.
            states: (B, S, K * w) or (B * S, K * w), the input of the output matrix.
        """
        history, momentum = self.history, self.method.momentum
        assert history is not None
        with torch.no_grad():
            seen = states if states.dim() == 3 else inputs.as_batch(states)
            channels = kept if self.units.channels == 1 else unit_channels(kept, self.units.channels)
            places = inputs.places if inputs.places is None else inputs.places_on(states.device)
            if places is None:
                update_history_(history, sum_of_squares(seen) / seen.shape[0], channels, momentum, None)
            else:
                moment, count = placed_second_moment(seen, places)
                update_history_(history, moment, channels, momentum, count > 0)
            if self.mean is not None:
                batch_mean = channel_mean(seen, None if places is None else places.real)
                update_mean_(self.mean, batch_mean, channels, momentum)
        return leave(states)

    def _earlier(self, inputs: BatchInputs) -> Earlier | None:
        """The residual that a parallel probe is taken from."""
        earlier = inputs.middle if self._mixes_tokens else inputs.entered
        return None if earlier is None else earlier.on(self.kept.device)

    # Decoding.

    def expect_decoding(self) -> None:
        """From now on leave the slices of prompts for the tokens that continue them."""
        if not self.decodes:  # written once only: graphs would do so for every token
            self.decodes = True

    def hold_slices(self) -> None:
        """Make what decoding runs on now.

        transformers compiles decoding with a cache of fixed size on accelerators, with CUDA graphs: what is made inside
        of one is gone with the next token.
        """
        self.expect_decoding()
        self.runner.slices.hold(self.last)

    def _apply(self, fn: Any, recurse: bool = True) -> "PrunedBlock":
        """Follow the model to its device, but stay in float32: a history in half precision stalls."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        self.runner.slices.forget()
        return self
