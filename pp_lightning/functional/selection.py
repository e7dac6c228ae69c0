"""From scores to indices to slices."""

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


def take_rows(weight: Tensor, units: Tensor, rows_per_unit: int) -> Tensor:
    """Rows of the kept units: weight (U * r, ...) to (K * r, ...), contiguous."""
    blocks = weight.view(-1, rows_per_unit, *weight.shape[1:]).index_select(0, units)
    return blocks.flatten(0, 1)


def take_columns(weight: Tensor, units: Tensor, columns_per_unit: int) -> Tensor:
    """Columns of the kept units: weight (D, U * c) to (D, K * c)."""
    blocks = weight.view(weight.shape[0], -1, columns_per_unit).index_select(1, units)
    return blocks.flatten(1, 2)
