"""What a pruned attention and a pruned MLP block have in common: choose, slice, run, remember."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from pp_lightning.blocks import BlockModules, Units
from pp_lightning.functional.budget import one_projection_is_cheaper
from pp_lightning.functional.compensation import channel_mean, restored_mean, update_mean_
from pp_lightning.functional.moments import Places, placed_second_moment, second_moment, update_history_
from pp_lightning.functional.selection import keep_best, unit_channels
from pp_lightning.methods.dynamic import AnyProbe, DynamicMethod
from pp_lightning.pruned.choice import Choice, HowToRun
from pp_lightning.pruned.slicing import BlockSlices
from pp_lightning.pruned.surroundings import Surroundings
from pp_lightning.pruned.weights import Weights
from pp_lightning.pruned.workspace import SliceWorkspace


class PrunedBlock(nn.Module, ABC):
    """One block of one layer under a dynamic method.

    A block that keeps all its units runs densely and never probes (``chooses`` is False). The layer keeps its modules
    and weights; this holds the history (P_max, C), the constant part of the scores (C,) and the units kept for the last
    batch (K,), as buffers that are not part of the checkpoint.

    Args:
        modules: the block's modules.
        units: its units.
        widths: rows (of ``output``: columns) that a unit has in each projection. What is not named stays whole.
        keep: K, how many of them stay; all of them means that the block runs densely and never probes.
        method: the policy.
        workspace: memory for slices, shared by the blocks of the model.
        history: (P_max, C) float32 to start from, or None for methods without.
        mean: (C,) float32, the running mean to start from, or None for methods without.
        packs: keep the slice between batches, see :class:`BlockSlices`.

    Attributes:
        slices: the block's weights, whole and sliced.
        mixes_tokens: whether tokens see each other in the block's front half.
        decodes: whether choices are held for decoding. From then on, prompts leave their slices for it.
    """

    mixes_tokens: ClassVar[bool]
    history: Tensor | None
    mean: Tensor | None
    weight_norm: Tensor
    kept: Tensor
    restored: Tensor | None

    def __init__(
        self,
        modules: BlockModules,
        units: Units,
        widths: Mapping[str, int],
        keep: int,
        method: DynamicMethod,
        workspace: SliceWorkspace,
        history: Tensor | None,
        mean: Tensor | None = None,
        packs: bool = False,
    ) -> None:
        super().__init__()
        self.units = units
        self.widths = widths
        self.keep = keep
        self.method = method
        self._modules_of_layer = (modules,)  # in a tuple: the layer owns them, not this module
        device = modules.output_weight.device
        self.chooses = keep < units.number
        norm = method.weight_norm(modules.output_weight) if self.chooses else torch.empty(0, device=device)
        self.register_buffer("weight_norm", norm, persistent=False)
        for name, start in (("history", history), ("mean", mean)):
            kept_here = start.to(device) if self.chooses and start is not None else None
            self.register_buffer(name, kept_here, persistent=False)
        self.register_buffer("kept", torch.arange(keep, device=device), persistent=False)
        restores = self.chooses and method.restores_means
        width = modules.output_weight.shape[0]
        self.register_buffer("restored", torch.zeros(width, device=device) if restores else None, persistent=False)
        self.decodes = False
        self.slices = BlockSlices(modules, widths, keep, units.number, workspace, packs=packs)

    @property
    def parts(self) -> BlockModules:
        """The block's modules inside the layer."""
        return self._modules_of_layer[0]

    def states(self, normed: Tensor, weights: Weights, around: Surroundings) -> Tensor:
        """The front half: from the normalised input (B, S, D) to the input of the output matrix (B, S, C or K * d)."""
        return self.mix(self.project(normed, weights), around, weights.kept)

    def project(self, normed: Tensor, weights: Weights) -> dict[str, Tensor]:
        """The input projections of (B, S, D), by role: all of the front half that has weights."""
        return {role: weights.apply(role, normed) for role in self.parts.inputs}

    @abstractmethod
    def mix(self, projected: Mapping[str, Tensor], around: Surroundings, kept: Tensor | None) -> Tensor:
        """The rest of the front half: attention, or activation and gate. May overwrite what it is given.

        Args:
            projected: by role, (B, S, ...), whole or of the kept units.
            around: mask, positions and cache.
            kept: (K,) the kept units; None where all are there.
        """

    def forward(
        self, residual: Tensor, probed: Tensor, around: Surroundings, how: HowToRun
    ) -> tuple[Tensor, Choice | None]:
        """Choose for a new batch, run it on the choice and remember it. Traces into one graph.

        Args:
            residual: (B, S, D) entering the block.
            probed: the residual that the probe is taken from; ``residual`` itself unless probing runs in parallel.
            around: mask, positions and cache.
            how: from :meth:`how_to_run`.

        Returns:
            The block's output (B, S, D), to be added to the residual, and the choice; None where all units stay.
        """
        normed = self.parts.norm(residual)
        if not self.chooses:
            return self.run_whole(normed, around), None
        source = normed if probed is residual else self.parts.norm(probed)
        if how.shares:
            return self._run_shared(normed, self.probe(source, probed, around), around, how.keep)
        choice = self.choose_from(source, probed, around, how.keep)
        return self.run(normed, choice, around, how), choice

    def choose_from(self, source: Tensor, probed: Tensor, around: Surroundings, keep: int) -> Choice:
        """Run the probe ahead and choose by it.

        Args:
            source: (B, S, D), the normalised ``probed``.
            probed: (B, S, D), the residual that the probe is taken from.
            around: mask and positions.
            keep: K.
        """
        probe = self.probe(source, probed, around)
        if probe is None:
            states = self.states(source, self.slices.whole(), replace(around, cache=None))
        else:
            states = self.states(probe.take(source), self.slices.whole(), around.of_probe(probe))
        return self.choose(states, probe, around, keep)

    def how_to_run(self, num_rows: int, num_tokens: int, *, parallel: bool, caching: bool = False) -> HowToRun:
        """How a batch of (B, S) is run: the same for all batches of one shape."""
        rows, tokens = self.method.probe_sizes(num_rows, num_tokens)
        sliced_anyway = caching and self.decodes and self.slices.can_be_left
        shares = not parallel and one_projection_is_cheaper(
            rows * tokens, num_rows * num_tokens, self.keep, self.units.number, sliced_anyway=sliced_anyway
        )
        return HowToRun(self.keep, shares, leaves=sliced_anyway and not shares)

    @torch.no_grad()
    def probe(self, source: Tensor, probed: Tensor, around: Surroundings) -> AnyProbe | None:
        """The part of the batch that runs ahead; None is all of it.

        Args:
            source: (B, S, D), the normalised ``probed``.
            probed: (B, S, D), the residual that the probe is taken from.
            around: positions, sizes and lots.
        """
        real = None if around.places is None else around.places.real
        lots = None if around.lots is None else around.lots[0 if self.mixes_tokens else 1]
        return self.method.select(probed, source, real, around.probe_sizes, lots=lots, mixes_tokens=self.mixes_tokens)

    @torch.no_grad()
    def choose(self, states: Tensor, probe: AnyProbe | None, around: Surroundings, keep: int) -> Choice:
        """The units to keep for this batch, and what the others contribute to it on average.

        Args:
            states: (b, s, C), what the probe's front half gives.
            probe: where in the batch that is.
            around: positions.
            keep: K.
        """
        energy, means = self.method.observe(states, probe, around.places, self.history, self.mean)
        kept = keep_best(self.method.unit_scores(energy, self.weight_norm, self.units.channels), keep)
        if means is None:
            return Choice(kept)
        return Choice(kept, restored_mean(self.parts.output_weight, means, unit_channels(kept, self.units.channels)))

    def _run_shared(
        self, normed: Tensor, probe: AnyProbe | None, around: Surroundings, keep: int
    ) -> tuple[Tensor, Choice]:
        """Probe and batch from one projection with all weights."""
        projected = self.project(normed, self.slices.whole())
        if self.mixes_tokens:
            ahead = projected if probe is None else {role: probe.take(states) for role, states in projected.items()}
            inside = replace(around, cache=None) if probe is None else around.of_probe(probe)
            choice = self.choose(self.mix(ahead, inside, None), probe, around, keep)
            weights = self.slices.for_batch(choice, ["output"])
            assert weights.kept is not None  # the kept units in the order of the slices
            states = self.mix(self._of_units(projected, weights.kept), around, weights.kept)
        else:  # token by token: the probe's states are among the batch's
            whole = self.mix(projected, around, None)
            choice = self.choose(whole if probe is None else probe.take(whole), probe, around, keep)
            weights = self.slices.for_batch(choice, ["output"])
            assert weights.kept is not None
            states = whole.index_select(-1, unit_channels(weights.kept, self.units.channels))
        return self._finish(states, weights, around), choice

    def _of_units(self, projected: Mapping[str, Tensor], kept: Tensor) -> dict[str, Tensor]:
        """Whole projections (B, S, U * w) reduced to the kept units."""
        reduced = dict(projected)
        for role in projected.keys() & self.widths.keys():
            heads = projected[role].unflatten(-1, (-1, self.widths[role]))
            reduced[role] = heads.index_select(2, kept).flatten(2)
        return reduced

    def run_whole(self, normed: Tensor, around: Surroundings) -> Tensor:
        """The output (B, S, D) of a block that keeps all its units."""
        return self._finish(self.states(normed, self.slices.whole(), around), self.slices.whole(), around)

    def run(self, normed: Tensor, choice: Choice, around: Surroundings, how: HowToRun) -> Tensor:
        """The output (B, S, D) of the whole batch on the choice; the history moves."""
        weights = self.slices.for_batch(choice, leave=how.leaves)
        return self._finish(self.states(normed, weights, around), weights, around)

    def decode(self, residual: Tensor, around: Surroundings) -> Tensor:
        """The output (B, S, D) of tokens that continue a batch, on the choice made for it; the history stays."""
        weights = self.hold_slices()
        states = self.states(self.parts.norm(residual), weights, around)
        return self._finish(states, weights, replace(around, remember=False))

    def hold(self, choice: Choice, how: HowToRun) -> None:
        """Note the choice of the batch, and where its slices are, for decoding and for whoever asks."""
        self.kept.copy_(choice.kept)
        if self.restored is not None and choice.restored is not None:
            self.restored.copy_(choice.restored)
        if how.leaves:
            self.slices.hold_left(self._last)

    def hold_slices(self) -> Weights:
        """What decoding runs on, made now where it is not there yet.

        transformers compiles decoding with a cache of fixed size on accelerators, with CUDA graphs: what is made inside
        of one is gone with the next token.
        """
        self.expect_decoding()
        return self.slices.hold(self._last)

    def expect_decoding(self) -> None:
        """From now on leave the slices of prompts for the tokens that continue them."""
        if self.chooses and not self.decodes:  # written once only: graphs would do so for every token
            self.decodes = True

    def prepare(self, how: HowToRun) -> None:
        """Before a new batch: let go of slices held for decoding, and have memory for the next one."""
        self.slices.prepare(how, self.kept)

    @property
    def _last(self) -> Choice:
        """What the last batch was run on."""
        return Choice(self.kept, self.restored)

    def _finish(self, states: Tensor, weights: Weights, around: Surroundings) -> Tensor:
        """Move the history by the batch's states (B, S, C or K * d), and apply the output matrix to them."""
        if self.history is not None and around.remember:
            assert weights.kept is not None
            with torch.no_grad():
                self.remember(states, weights.kept, around.places)
        return weights.apply("output", states)

    def remember(self, states: Tensor, kept: Tensor, places: Places | None) -> None:
        """Move the history, and the running mean where there is one, by a batch.

        Args:
            states: (B, S, C or K * d), the input of the output matrix.
            kept: (K,) int64, the units that it has.
            places: positions of the batch.
        """
        assert self.history is not None
        channels = unit_channels(kept, self.units.channels)
        if places is None:
            update_history_(self.history, second_moment(states), channels, self.method.momentum, None)
        else:
            moment, count = placed_second_moment(states, places)
            update_history_(self.history, moment, channels, self.method.momentum, count > 0)
        if self.mean is not None:
            batch_mean = channel_mean(states, None if places is None else places.real)
            update_mean_(self.mean, batch_mean, channels, self.method.momentum)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PrunedBlock":
        """Follow the model to its device, but stay in float32: a history in half precision stalls."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        self.slices.forget()
        return self
