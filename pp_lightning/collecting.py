"""Sums over the states of blocks, batch by batch, seen through hooks on the unmodified model."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pp_lightning.blocks import BlockKey
from pp_lightning.families import BlockModules
from pp_lightning.functional.compensation import channel_mean
from pp_lightning.functional.moments import (
    TokenPositions,
    placed_count,
    placed_sum,
    sum_of_squares,
    sum_of_squares_about,
)
from pp_lightning.functional.probe import token_norms
from pp_lightning.interfaces import first_argument
from pp_lightning.pruned.check import Meeting
from pp_lightning.statistics import BlockSums, Statistics


class Collector:
    """Adds the states of each batch to the statistics."""

    def __init__(self, statistics: Statistics, means: bool) -> None:
        self.statistics = statistics
        self.means = means
        self.mask: Tensor | None = None
        self.position_ids: Tensor | None = None
        self.shape = torch.Size()
        self.places: TokenPositions | None = None
        self.counts = True

    def attach(self, blocks: Mapping[BlockKey, BlockModules], met: Mapping[BlockKey, Meeting]) -> list[RemovableHandle]:
        """Watch the first layer's input, the residual that enters each block, and the input of its output matrix."""
        first = next(iter(blocks.values())).layer
        hooks = [first.register_forward_pre_hook(self._count, with_kwargs=True)]
        for key, block in blocks.items():
            norm = met[key].norm
            meets = getattr(block.layer, norm) if norm is not None else block.owner
            hooks.append(meets.register_forward_pre_hook(partial(self._add_residual, key), with_kwargs=True))
            output = block.projection(block.output)
            hooks.append(output.register_forward_pre_hook(partial(self._add, key)))
        return hooks

    def begin(self, mask: Tensor | None, position_ids: Tensor | None, *, counts: bool) -> None:
        """Take a batch's attention mask (B, S) and position ids (B or 1, S).

        None where everything is real, and where positions follow from what is. Its tokens are counted once.
        """
        self.mask, self.position_ids, self.counts = mask, position_ids, counts

    def _count(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Find the real tokens of a batch and count them."""
        hidden, mask = first_argument(layer, args, kwargs), self.mask
        self.shape, device = hidden.shape[:2], hidden.device
        rows, tokens = self.shape
        padded = mask is not None and not bool(mask.all())
        if padded or self.position_ids is not None:
            real = hidden.new_ones(self.shape, dtype=torch.bool) if mask is None else mask.bool().to(device)
            given = self.position_ids
            positions = real.long().cumsum(1) - 1 if given is None else given.to(device).expand(self.shape)
            self.places = TokenPositions(positions, real, 1 + int(positions.masked_fill(~real, 0).max()))
            count = placed_count(self.places)
        else:
            self.places = None
            count = torch.full((tokens,), float(rows), dtype=torch.float32, device=device)
        statistics = self.statistics
        if not self.counts:
            return
        statistics.counts = _add_rows(statistics.counts.to(device), count)

    def _add(self, key: BlockKey, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        states = inputs[0].view(*self.shape, -1)  # OPT flattens rows and tokens in its MLP
        places, old = self._places_on(states.device), self.statistics.sums.get(key)
        squares = sum_of_squares(states) if places is None else placed_sum(states.float().square(), places)
        new = BlockSums(squares, None)
        if self.means:
            # The first batch's mean is near enough to that of all of them for deviations not to drown.
            shift = channel_mean(states, None if places is None else places.real) if old is None else old.shift
            assert shift is not None
            new.shift = shift = shift.to(states.device)
            if places is None:
                new.values = states.sum(0, dtype=torch.float32)
                new.spread = sum_of_squares_about(states, shift)
            else:
                new.values = placed_sum(states, places)
                new.spread = placed_sum((states.float() - shift).square(), places)
        self.statistics.sums[key] = new if old is None else _together(old, new)

    def _add_residual(self, key: BlockKey, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        states = first_argument(module, args, kwargs).view(*self.shape, -1)  # flat in OPT's MLP, see _add
        energy = token_norms(states).square()
        places = self._places_on(states.device)
        total = energy.sum(0) if places is None else placed_sum(energy[..., None], places).squeeze(1)
        old = self.statistics.residuals.get(key)
        self.statistics.residuals[key] = total if old is None else _add_rows(old.to(total.device), total)

    def _places_on(self, device: torch.device) -> TokenPositions | None:
        return None if self.places is None else self.places.to(device)


def _together(old: BlockSums, new: BlockSums) -> BlockSums:
    """Sums over both; those of the longer one are added to in place."""

    def added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
        return None if one is None or other is None else _add_rows(one.to(other.device), other)

    squares = _add_rows(old.squares.to(new.squares.device), new.squares)
    return BlockSums(squares, added(old.values, new.values), new.shift, added(old.spread, new.spread))


def _add_rows(total: Tensor, addend: Tensor) -> Tensor:
    """Sum of two tensors whose first dimension (positions) may differ; the longer one is added to in place."""
    if len(total) < len(addend):
        total, addend = addend, total
    total[: len(addend)] += addend
    return total
