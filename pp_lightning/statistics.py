"""Calibration statistics: sums over a calibration set, kept as a file of safetensors."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from pp_lightning.blocks import Block, BlockKey
from pp_lightning.calibration_data import CalibrationData, fingerprint
from pp_lightning.errors import UserError
from pp_lightning.stored import at, places_of, values_of, write_whole

__all__ = ["BlockKey", "BlockSums", "Statistics", "fingerprint"]

_NO_MEANS = "these statistics have no means, which this method needs: calibrate(..., means=True)"


@dataclass
class BlockSums:
    """Sums of one block's states X (the input of its output matrix), by position and channel.

    Attributes:
        squares: sum of X^2, (P, C) float32.
        values: sum of X, (P, C) float32; None where only second moments were asked for.
        shift: (C,) float32, some number near the mean of each channel; None is zero.
        spread: sum of (X - shift)^2, (P, C) float32; None is ``squares``. Where a mean is many standard deviations from
            zero, nothing is left of the deviations in float32 sums of X^2.
    """

    squares: Tensor
    values: Tensor | None
    shift: Tensor | None = None
    spread: Tensor | None = None

    def read(self) -> "BlockSums":
        """The same in memory, where the sums have been left on disk."""
        values, shift, spread = (
            None if one is None else values_of(one) for one in (self.values, self.shift, self.spread)
        )
        return BlockSums(values_of(self.squares), values, shift, spread)


@dataclass(repr=False)  # in a notebook, all tensors would be shown
class Statistics(CalibrationData):
    """What one dense pass over a calibration set leaves behind.

    Attributes:
        model: fingerprint of the model that they were collected on, see :func:`fingerprint`.
        counts: real tokens seen at each position, (P,) float32.
        sums: one entry for each block of each calibrated layer.
        residuals: sum of ||R||^2 by position, (P,) float32, of the residual R that enters each of these blocks.
        batches_digest: SHA-256 (hex) over the batches seen, in order.
    """

    called: ClassVar[str] = "statistics"
    verb: ClassVar[str] = "calibrate"
    form: ClassVar[str] = "pp-lightning statistics 3"

    model: str
    counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float32))
    sums: dict[BlockKey, BlockSums] = field(default_factory=dict)
    residuals: dict[BlockKey, Tensor] = field(default_factory=dict)
    num_batches: int = 0
    batches_digest: str = ""

    def __repr__(self) -> str:
        """In one line: what was collected."""
        tokens, means = int(self.counts.sum()), any(sums.values is not None for sums in self.sums.values())
        sizes = f"batches={self.num_batches}, tokens={tokens}, positions={self.num_positions}"
        return f"Statistics({sizes}, blocks={len(self.sums)}, means={means})"

    @property
    def num_positions(self) -> int:
        """S_max: one more than the highest position seen."""
        return len(self.counts)

    def second_moment(self, layer: int, block: Block, *, release: bool = False) -> Tensor:
        """Mean of X^2 over the rows real at each position: (P, C) float32, zero at positions never seen.

        ``release`` gives up the sums of this block, which saves the memory of a copy.
        """
        sums = self._of(layer, block)
        if not release:
            return sums.squares / self._rows_at(sums.squares)[:, None]
        del self.sums[layer, block]
        return sums.squares.div_(self._rows_at(sums.squares)[:, None])

    def channel_moments(self, layer: int, block: Block) -> tuple[Tensor, Tensor]:
        """E[x] and E[x^2] of each channel over all real tokens: two (C,) float32 tensors.

        Raises:
            UserError: the statistics were collected without means.
        """
        sums, values = self._with_means(layer, block)
        tokens = self.counts.sum().to(values.device)
        return values.sum(0) / tokens, sums.squares.sum(0) / tokens

    def variance(self, layer: int, block: Block) -> Tensor:
        """E[(x - E[x])^2] of each channel over all real tokens: (C,) float32."""
        sums, values = self._with_means(layer, block)
        spread, tokens = _spread(sums), self.counts.sum().to(values.device)
        from_shift = _from_shift(sums, values, tokens)
        return (spread.sum(0, dtype=torch.float64) / tokens - from_shift.square()).clamp(min=0.0).float()

    def deviations(self, layer: int, block: Block) -> Tensor:
        """E[(x - m)^2] by position, m the channel's mean over all real tokens: (P, C) float32, zero at others."""
        sums, values = self._with_means(layer, block)
        rows = self.counts.to(values.device)[:, None]
        from_shift = _from_shift(sums, values, self.counts.sum().to(values.device)).float()
        moved = values if sums.shift is None else values - rows * sums.shift
        about = _spread(sums) - from_shift * (2 * moved - rows * from_shift)
        return about.clamp(min=0.0) / rows.clamp(min=1.0)

    def means(self, layer: int, block: Block) -> Tensor:
        """E[x] by position: (P, C) float32, zero at positions never seen."""
        values = self._with_means(layer, block)[1]
        return values / self._rows_at(values)[:, None]

    def residual_energy(self, layer: int, block: Block) -> Tensor:
        """E[||R||^2] by position of the residual that enters a block: (P,) float32, zero at positions never seen."""
        self._of(layer, block)
        residuals = self.residuals[layer, block]
        return residuals / self._rows_at(residuals)

    def energy(self, layer: int, block: Block) -> Tensor:
        """E[x^2] summed over positions: (C,) float32."""
        squares = self._of(layer, block).squares
        return (squares / self._rows_at(squares)[:, None]).sum(0)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file; an existing one is replaced only when the new one is complete."""
        tensors = {"counts": self.counts}
        for key in self.sums:
            tensors |= self.tensors_of(key)
        header = {"model": self.model, "num_batches": self.num_batches, "batches_digest": self.batches_digest}
        self._write(path, header, tensors)

    def tensors_of(self, key: BlockKey) -> dict[str, Tensor]:
        """What a file holds of one block, by name."""
        sums, (layer, block) = self.sums[key], key
        found = {**vars(sums), "residual": self.residuals[key]}
        return {f"{layer}.{block.value}.{name}": tensor for name, tensor in found.items() if tensor is not None}

    def leave(self, layer: int, file: Path, about: str) -> None:
        """Write a layer's sums to a file of their own, and leave them there."""
        own = [key for key in self.sums if key[0] == layer]
        tensors = {name: tensor for key in own for name, tensor in self.tensors_of(key).items()}
        write_whole(file, tensors | {"counts": self.counts}, {"about": about}, self.called)
        self.find(layer, file)

    def find(self, layer: int, file: Path) -> None:
        """Take a layer's sums from where :meth:`leave` has left them."""
        places = places_of(file)
        self.counts = places.pop("counts").read()
        for name in [name for name in places if name.endswith(".squares")]:
            key = layer, Block(name.split(".")[1])
            prefix = name.removesuffix("squares")
            parts = ("squares", "values", "shift", "spread")
            found = [at(places[prefix + part]) if prefix + part in places else None for part in parts]
            assert found[0] is not None
            self.sums[key] = BlockSums(found[0], *found[1:])
            self.residuals[key] = places[f"{prefix}residual"].read()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Statistics":
        """Read a file written by :meth:`save`.

        Raises:
            UserError: there is no such file, or it is not one of ours.
        """
        header, tensors = cls._read(path)
        statistics = cls(counts=tensors.pop("counts"), **header)
        for key in [key for key in tensors if key.endswith(".squares")]:
            layer, block, _ = key.split(".")
            more = (tensors.get(f"{layer}.{block}.{name}") for name in ("values", "shift", "spread"))
            statistics.sums[int(layer), Block(block)] = BlockSums(tensors[key], *more)
            statistics.residuals[int(layer), Block(block)] = tensors[f"{layer}.{block}.residual"]
        return statistics

    def _rows_at(self, sums: Tensor) -> Tensor:
        """Rows seen at each position, at least 1, where a layer's sums are: layers may be on several devices."""
        return self.counts.clamp(min=1.0).to(sums.device)

    def _with_means(self, layer: int, block: Block) -> tuple[BlockSums, Tensor]:
        sums = self._of(layer, block)
        if sums.values is None:
            raise UserError(_NO_MEANS)
        return sums, sums.values

    def _of(self, layer: int, block: Block) -> BlockSums:
        try:
            return self.sums[layer, block].read()
        except KeyError:
            raise UserError(f"these statistics do not cover the {block.value} block of layer {layer}") from None


def _spread(sums: BlockSums) -> Tensor:
    return sums.squares if sums.spread is None else sums.spread


def _from_shift(sums: BlockSums, values: Tensor, tokens: Tensor) -> Tensor:
    """How far the mean of each channel is from its shift: (C,) float64, as both may be large."""
    mean = values.sum(0, dtype=torch.float64) / tokens
    return mean if sums.shift is None else mean - sums.shift
