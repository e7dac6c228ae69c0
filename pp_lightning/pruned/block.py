"""A block of a transformer layer under a dynamic method: choose, slice, run the stock code, remember."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pp_lightning.blocks import Block
from pp_lightning.functional.compensation import channel_mean, restored_mean, update_mean_
from pp_lightning.functional.linear import wants_rows
from pp_lightning.functional.moments import placed_second_moment, second_moment, update_history_
from pp_lightning.functional.selection import keep_best, unit_channels
from pp_lightning.interfaces import adapted_weight, run_stock
from pp_lightning.methods.dynamic import AnyProbe, DynamicMethod
from pp_lightning.pruned.choice import Choice, ExecutionPlan
from pp_lightning.pruned.context import ModelContext
from pp_lightning.pruned.inputs import Arguments, BatchInputs, Earlier, probe_arguments
from pp_lightning.pruned.projection import PrunedProjection, Run
from pp_lightning.pruned.recomputing import Recomputing
from pp_lightning.pruned.runner import BlockRunner
from pp_lightning.pruned.runs import ChoosingAtOutput, OnChoice


class PrunedBlock(nn.Module):
    """Hangs on the module of a block as ``pruner``; its :meth:`forward` stands in for the module's. It owns no weight.

    The stock code runs twice: on the probe, with all weights, up to the output projection, whose input is what scores
    are made of; then on the whole batch, with slices of the kept units in its projections. This holds the history
    (P_max, C), the constant part of the scores (C,) and the units kept for the last batch (K,), as buffers that are not
    part of the checkpoint.

    Args:
        runner: of the stock code.
        index: of the layer.
        method: the policy.
        context: shared by the blocks of the model.
        norm: the norm in front of the block; None where the residual itself enters.
        history: (P_max, C) float32 to start from, or None for methods without.
        mean: (C,) float32, the running mean to start from, or None for methods without.

    Attributes:
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
        self.recomputing = Recomputing()
        self._norm = (norm,)  # in a tuple: the layer owns it, not this module
        self._residual: tuple[Tensor, ...] = ()
        weight = adapted_weight(runner.output.module)
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
    def mixes_tokens(self) -> bool:
        """Whether tokens see each other in front of the output projection."""
        return self.block is Block.ATTENTION

    @property
    def last(self) -> Choice:
        """What the last batch was run on."""
        return Choice(self.kept, self.restored)

    # What the layer calls.

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block on a batch. Traces into one graph."""
        names = self.runner.names
        given = dict(zip(names, args, strict=False)) | kwargs
        hidden = given.pop(names[0])
        inputs = self.context.batch
        if inputs is None:
            return self.runner.stock(hidden, given)
        return self.runner.run_as(self._decide(hidden, given, inputs), hidden, given)

    def begin(self, projection: PrunedProjection, hidden: Tensor) -> Tensor:
        """The same for a block without a module of its own: what its first projection gives. The output ends the run."""
        inputs = self.context.batch
        if inputs is None:
            return projection.stock(hidden)
        self.runner.run = run = self._decide(hidden, {}, inputs)
        return run.enter(projection, hidden)

    def see_residual(self, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Forward pre-hook of the norm in front: its input is what ranks the probe."""
        inputs = self.context.batch
        if inputs is not None and not inputs.decoding:
            self._residual = (inputs.as_batch(args[0]),)

    # One batch.

    def _decide(self, hidden: Tensor, given: Arguments, inputs: BatchInputs) -> Run:
        """How the batch's projections run: on the choice that is held, or on one that is made now."""
        slices = self.runner.slices
        if inputs.decoding:
            self.expect_decoding()
            return OnChoice(slices.hold(self.last), self.last)
        plan = self.plan(inputs)
        slices.prepare(leaves=plan.leaves)
        known = self.recomputing.known(hidden, self.runner.modules.layer)
        if known is not None:
            return OnChoice(slices.of(known), known)
        residual, self._residual = self._residual or (inputs.as_batch(hidden),), ()
        if plan.shares and not self.mixes_tokens:  # token by token: the probe's states are among the batch's
            return ChoosingAtOutput(
                partial(self._choose_late, inputs.as_batch(hidden), residual[0], inputs, plan), self.units.channels
            )
        ahead = self.runner.whole_outputs(hidden) if plan.shares else None
        choice = self._choose(inputs.as_batch(hidden), residual[0], given, inputs, plan, ahead)
        weights = slices.of(choice, leaves=plan.leaves, output_alone=plan.shares)
        self._hold(choice)
        if plan.leaves and not torch.compiler.is_compiling():
            slices.held = weights
        return OnChoice(weights, choice, self._memory(inputs), ahead)

    def plan(self, inputs: BatchInputs) -> ExecutionPlan:
        """How a batch is run: the same for all batches of one shape."""
        if inputs.plans is not None:
            return inputs.plans[self.block]
        leaves = inputs.caching and self.decodes and not torch.is_grad_enabled()
        leaves = leaves and not wants_rows(self.runner.output.module.weight)
        return inputs.plan(self.method, self.runner.keep, self.units.number, leaves=leaves)

    @torch.no_grad()
    def _choose(
        self,
        hidden: Tensor,
        residual: Tensor,
        given: Arguments,
        inputs: BatchInputs,
        plan: ExecutionPlan,
        ahead: dict[str, Tensor] | None,
    ) -> Choice:
        """Run the probe ahead and choose by it, on a stream of its own where the probe need not wait.

        Args:
            hidden: (B, S, D), entering the block.
            residual: (B, S, D), what ranks the probe.
            given: the other arguments of the block's module.
            inputs: of the batch.
            plan: of the batch.
            ahead: outputs of the input projections on the batch, by name, with all weights; None runs them.
        """
        earlier = self._earlier(inputs)
        if earlier is None:
            return self.choose_by_probe(hidden, residual, given, inputs, plan, ahead)
        choose = partial(self._choose_by_earlier, earlier.residual, given, inputs, plan)
        side = self.context.side_stream(hidden.device)
        if side is None:
            return choose()
        return side.join(side.start(earlier.since or side.moment(), choose))

    def _choose_by_earlier(
        self, residual: Tensor, given: Arguments, inputs: BatchInputs, plan: ExecutionPlan
    ) -> Choice:
        norm = self._norm[0]
        source = residual if norm is None else run_stock(norm, residual)
        return self.choose_by_probe(source, residual, given, inputs, plan, None)

    def choose_by_probe(
        self,
        source: Tensor,
        residual: Tensor,
        given: Arguments,
        inputs: BatchInputs,
        plan: ExecutionPlan,
        ahead: dict[str, Tensor] | None,
    ) -> Choice:
        """Choose by a probe that is cut from ``source`` (B, S, D); see :meth:`_choose`."""
        probe = self._probe(source, residual, inputs, plan)
        part = source if probe is None else probe.take(source)
        if ahead is not None and probe is not None:
            ahead = {name: probe.take(states) for name, states in ahead.items()}
        states = self.runner.states(part, probe_arguments(given, probe), ahead)
        return self._choice(states, probe, inputs)

    def _choose_late(
        self, hidden: Tensor, residual: Tensor, inputs: BatchInputs, plan: ExecutionPlan, states: Tensor
    ) -> OnChoice:
        """Choose by states (B, S, C) or (B * S, C) of the whole batch, the probe's among them."""
        with torch.no_grad():
            probe, whole = self._probe(hidden, residual, inputs, plan), inputs.as_batch(states)
            choice = self._choice(whole if probe is None else probe.take(whole), probe, inputs)
            self._hold(choice)
        return OnChoice(self.runner.slices.of(choice, output_alone=True), choice, self._memory(inputs))

    def _probe(self, source: Tensor, residual: Tensor, inputs: BatchInputs, plan: ExecutionPlan) -> AnyProbe | None:
        """The part of the batch that runs ahead; None is all of it."""
        places = inputs.places_on(source.device)
        real = None if places is None else places.real
        lots = inputs.lots_of(self.index, 0 if self.mixes_tokens else 1, source.device)
        return self.method.select(residual, source, real, plan.probe_sizes, lots=lots, mixes_tokens=self.mixes_tokens)

    def _choice(self, states: Tensor, probe: AnyProbe | None, inputs: BatchInputs) -> Choice:
        """The units to keep for this batch, and what the others contribute to it on average.

        Args:
            states: (b, s, C), what reaches the output projection on the probe.
            probe: where in the batch that is.
            inputs: of the batch.
        """
        places = inputs.places_on(states.device)
        energy, means = self.method.observe(states, probe, places, self.history, self.mean)
        scores = self.method.unit_scores(energy, self.weight_norm, self.units.channels)
        kept = keep_best(scores, self.runner.keep)
        if means is None:
            return Choice(kept)
        weight = self.runner.output.module.weight
        return Choice(kept, restored_mean(weight, means, unit_channels(kept, self.units.channels)))

    def _hold(self, choice: Choice) -> None:
        """Note the choice of the batch for decoding, and for whoever asks."""
        self.kept.copy_(choice.kept)
        if self.restored is not None and choice.restored is not None:
            self.restored.copy_(choice.restored)
        self.recomputing.note(choice)

    def _memory(self, inputs: BatchInputs) -> Any:
        """What moves the history by the batch's states; None leaves it."""
        return partial(self.remember, inputs) if inputs.remember and self.history is not None else None

    @torch.no_grad()
    def remember(self, inputs: BatchInputs, states: Tensor, kept: Tensor) -> None:
        """Move the history, and the running mean where there is one, by a batch.

        Args:
            inputs: of the batch.
            states: (..., K * w), the input of the output matrix.
            kept: (K,) int64, the units that it has.
        """
        assert self.history is not None
        states, places = inputs.as_batch(states), inputs.places_on(states.device)
        channels = unit_channels(kept, self.units.channels)
        if places is None:
            update_history_(self.history, second_moment(states), channels, self.method.momentum, None)
        else:
            moment, count = placed_second_moment(states, places)
            update_history_(self.history, moment, channels, self.method.momentum, count > 0)
        if self.mean is not None:
            batch_mean = channel_mean(states, None if places is None else places.real)
            update_mean_(self.mean, batch_mean, channels, self.method.momentum)

    def _earlier(self, inputs: BatchInputs) -> Earlier | None:
        """The residual that a parallel probe is taken from."""
        if self.method.probe_source != "previous":
            return None
        earlier = inputs.middle if self.mixes_tokens else inputs.entered
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
