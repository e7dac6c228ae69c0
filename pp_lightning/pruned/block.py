"""What a pruned attention and a pruned MLP block have in common: choose, slice, run, remember."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pp_lightning.blocks import BlockModules, Units
from pp_lightning.functional.moments import Places, placed_second_moment, second_moment, update_history_
from pp_lightning.functional.probe import Probe
from pp_lightning.functional.scores import ppsp_weight_norm
from pp_lightning.functional.selection import keep_best, store_by_columns, take_columns, take_rows, unit_channels
from pp_lightning.methods.dynamic import DynamicMethod
from pp_lightning.pruned.context import BatchContext
from pp_lightning.pruned.workspace import Memory, fresh_memory


class Projection(NamedTuple):
    """Weight (out, in) and bias (out,) of a linear map, whole or sliced."""

    weight: Tensor
    bias: Tensor | None

    def of_outputs(self, units: Tensor, per_unit: int, memory: Memory) -> "Projection":
        """Only the outputs (rows) of these units."""
        bias = None if self.bias is None else take_rows(self.bias, units, per_unit)
        shape = (len(units) * per_unit, self.weight.shape[1])
        return Projection(take_rows(self.weight, units, per_unit, memory(shape, self.weight)), bias)

    def of_inputs(self, units: Tensor, per_unit: int, memory: Memory) -> "Projection":
        """Only the inputs (columns) of these units; the bias belongs to the outputs and stays."""
        shape = (len(units) * per_unit, self.weight.shape[0])
        return Projection(take_columns(self.weight, units, per_unit, memory(shape, self.weight)), self.bias)


@dataclass(frozen=True)
class Weights:
    """A block's projections by role, whole (``kept`` is None) or reduced to the kept units (K,)."""

    projections: Mapping[str, Projection]
    kept: Tensor | None = None

    def apply(self, role: str, states: Tensor) -> Tensor:
        """The linear map ``role`` of (..., in)."""
        return nn.functional.linear(states, *self.projections[role])


@dataclass(frozen=True)
class Surroundings:
    """What a block's arithmetic needs beside its weights and its input. Empty for an MLP.

    Attributes:
        mask: the decoder's attention mask, (B or 1, 1, S, T), bool or additive; None is causal.
        rotation: cos and sin, each (B or 1, S, d); None without rotary positions.
        cache: the key/value cache to extend; None for the probe and without caching.
    """

    mask: Tensor | None = None
    rotation: tuple[Tensor, Tensor] | None = None
    cache: Any = None

    def without_cache(self, num_tokens: int) -> "Surroundings":
        """The same for the whole batch with no cache to extend (a static one has more places than the batch)."""
        return Surroundings(None if self.mask is None else self.mask[..., :num_tokens], self.rotation)

    def of_probe(self, probe: Probe) -> "Surroundings":
        """The same for the probe's rows and tokens, at their true positions and without a cache."""
        return Surroundings(self._probe_mask(probe), self._probe_rotation(probe))

    def _probe_mask(self, probe: Probe) -> Tensor | None:
        if self.mask is None:
            return None
        rows = self.mask if self.mask.shape[0] == 1 else self.mask.index_select(0, probe.rows)
        mask = rows.index_select(2, probe.tokens).index_select(3, probe.tokens)
        if probe.real_tokens is None:
            return mask
        return (
            mask & probe.real_tokens
            if mask.dtype == torch.bool
            else mask.masked_fill(~probe.real_tokens, torch.finfo(mask.dtype).min)
        )

    def _probe_rotation(self, probe: Probe) -> tuple[Tensor, Tensor] | None:
        if self.rotation is None:
            return None
        cos, sin = (t if t.shape[0] == 1 else t.index_select(0, probe.rows) for t in self.rotation)
        return cos.index_select(1, probe.tokens), sin.index_select(1, probe.tokens)


class PrunedBlock(nn.Module, ABC):
    """One block of one layer under a dynamic method.

    The layer keeps its modules and weights; this holds the history (P_max, C), the constant part of the scores (C,) and
    the units kept for the last batch (K,), as buffers that are not part of the checkpoint.

    Args:
        modules: the block's modules.
        units: its units.
        keep: K, how many of them stay; all of them means that the block runs densely and never probes.
        method: the policy.
        context: shared by the layers of the model.
        history: (P_max, C) float32 to start from, or None for methods without.
    """

    history: Tensor | None
    weight_norm: Tensor
    kept: Tensor

    def __init__(
        self,
        modules: BlockModules,
        units: Units,
        keep: int,
        method: DynamicMethod,
        context: BatchContext,
        history: Tensor | None,
    ) -> None:
        super().__init__()
        self.units = units
        self.keep = keep
        self.method = method
        self.context = context
        self._modules_of_layer = (modules,)  # in a tuple: the layer owns them, not this module
        device = modules.output_weight.device
        choosing = keep < units.number
        norm = ppsp_weight_norm(modules.output_weight) if choosing else torch.empty(0, device=device)
        self.register_buffer("weight_norm", norm, persistent=False)
        self.register_buffer(
            "history", history.to(device) if choosing and history is not None else None, persistent=False
        )
        self.register_buffer("kept", torch.arange(keep, device=device), persistent=False)
        self._held: Weights | None = None
        block_size = sum(linear.weight.numel() for linear in (*modules.inputs.values(), modules.output))
        self.slice_size = block_size * keep // units.number

    @property
    def parts(self) -> BlockModules:
        """The block's modules inside the layer."""
        return self._modules_of_layer[0]

    @abstractmethod
    def states(self, normed: Tensor, weights: Weights, around: Surroundings) -> Tensor:
        """The front half: from the normalised input (B, S, D) to the input of the output matrix (B, S, C or K * d)."""

    @abstractmethod
    def slices(self, kept: Tensor, memory: Memory) -> Mapping[str, Projection]:
        """The block's projections reduced to the kept units (K,), written into ``memory``."""

    def forward(self, residual: Tensor, probed: Tensor, around: Surroundings) -> Tensor:
        """The block's output (B, S, D), to be added to the residual.

        Args:
            residual: (B, S, D) entering the block.
            probed: the residual that the probe is taken from; ``residual`` itself unless probing runs in parallel.
            around: mask, rotary positions and cache.
        """
        normed = self.parts.norm(residual)
        if self.keep == self.units.number:
            weights = self.dense()
        elif self.context.decoding:
            weights = self._held = self._held or Weights(self.slices(self.kept, fresh_memory), self.kept)
        else:
            self._held = None  # before slicing again, so that two slices never exist at once
            with torch.no_grad():
                self.kept.copy_(self._choose(normed, residual, probed, around))
            memory = self.context.workspace.begin(self.parts.output_weight, self.slice_size)
            weights = Weights(self.slices(self.kept, memory), self.kept)
        states = self.states(normed, weights, around)
        if self.history is not None and not (self.context.decoding or self.context.frozen):
            with torch.no_grad():
                self._remember(states, self.context.places(around.mask))
        return weights.apply("output", states)

    def dense(self) -> Weights:
        """The block's projections, whole."""
        modules = {**self.parts.inputs, "output": self.parts.output}
        return Weights({role: Projection(module.weight, module.bias) for role, module in modules.items()})

    def lay_out_for_slicing(self) -> None:
        """Store the output matrix so that the kept columns are copied whole. No value changes, only the strides."""
        if self.keep < self.units.number:
            weight = self.parts.output.weight
            weight.data = store_by_columns(weight.data)

    def lay_out_as_stock(self) -> None:
        """Undo :meth:`lay_out_for_slicing`."""
        weight = self.parts.output.weight
        weight.data = weight.data.contiguous()

    def _choose(self, normed: Tensor, residual: Tensor, probed: Tensor, around: Surroundings) -> Tensor:
        source = normed if probed is residual else self.parts.norm(probed)
        places = self.context.places(around.mask)
        probe = self.method.select(probed, source, None if places is None else places.real)
        if probe is None:
            states = self.states(source, self.dense(), around.without_cache(source.shape[1]))
        else:
            states = self.states(probe.take(source), self.dense(), around.of_probe(probe))
        energy = self.method.energy(states, probe, places, self.history)
        return keep_best(self.method.unit_scores(energy, self.weight_norm, self.units.channels), self.keep)

    def _remember(self, states: Tensor, places: Places | None) -> None:
        assert self.history is not None
        channels = unit_channels(self.kept, self.units.channels)
        if places is None:
            update_history_(self.history, second_moment(states), channels, self.method.momentum, None)
        else:
            moment, count = placed_second_moment(states, places)
            update_history_(self.history, moment, channels, self.method.momentum, count > 0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PrunedBlock":
        """Follow the model to its device, but stay in float32: a history in half precision stalls."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        self._held = None
        return self
