"""From scores to indices to slices."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def keep_best(scores: Tensor, count: int) -> Tensor:
    """Indices (count,) int64, ascending, of the units (U,) with the largest scores."""
    return scores.topk(count).indices.sort().values


def unit_channels(units: Tensor, channels_per_unit: int) -> Tensor:
    """Channel indices (K * channels_per_unit,) of units (K,), in order."""
    if channels_per_unit == 1:
        return units
    offsets = torch.arange(channels_per_unit, device=units.device)
    return (units[:, None] * channels_per_unit + offsets).flatten()


def take_rows(weight: Tensor, units: Tensor, rows_per_unit: int, out: Tensor | None = None) -> Tensor:
    """Rows of the kept units: weight (U * r, ...) to (K * r, ...), contiguous.

    Args:
        weight: what to take from, contiguous.
        units: (K,) int64.
        rows_per_unit: r.
        out: memory for the result, (K * r, ...), contiguous; None allocates.
    """
    blocks = weight.view(-1, rows_per_unit, *weight.shape[1:])
    if out is None:
        return blocks.index_select(0, units).flatten(0, 1)
    torch.index_select(blocks, 0, units, out=out.view(-1, rows_per_unit, *weight.shape[1:]))
    return out


class Rows(NamedTuple):
    """Consecutive rows of a projection that belong to units in the same way.

    Attributes:
        start: the first of them.
        number: how many.
        width: rows of one unit; 0 where all of them stay, whatever is kept.
    """

    start: int
    number: int
    width: int


def take_unit_rows(weight: Tensor, rows: Sequence[Rows], units: Tensor) -> Tensor:
    """Rows of the kept units (K,) of a projection whose rows have several roles: (out, ...) to (fewer, ...)."""
    parts = [(weight[start : start + number], width) for start, number, width in rows]
    return torch.cat([take_rows(part, units, width) if width else part for part, width in parts])


def take_columns(weight: Tensor, units: Tensor, columns_per_unit: int, out: Tensor | None = None) -> Tensor:
    """Columns of the kept units: weight (D, U * c) to (D, K * c).

    Args:
        weight: what to take from. Stored column by column (see :func:`store_by_columns`), columns are copied whole.
        units: (K,) int64.
        columns_per_unit: c.
        out: memory for the result of a weight that is stored by columns, (K * c, D), contiguous; None allocates.
    """
    if weight.t().is_contiguous():
        return take_rows(weight.t(), units, columns_per_unit, out).t()
    if columns_per_unit == 1:  # gather runs over single columns two to three times as fast as index_select
        return weight.gather(1, units.expand(weight.shape[0], -1))
    blocks = weight.view(weight.shape[0], -1, columns_per_unit).index_select(1, units)
    return blocks.flatten(1, 2)


def store_by_columns(weight: Tensor) -> Tensor:
    """The same matrix (D, C), laid out in memory so that each column is contiguous; itself where it already is."""
    return weight.t().contiguous().t()
