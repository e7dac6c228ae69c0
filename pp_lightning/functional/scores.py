"""Importance scores of channels and units. All float32, larger means more important."""

import torch
from torch import Tensor

_ROWS_AT_ONCE = 256


def ppsp_weight_norm(weight: Tensor) -> Tensor:
    """``sqrt(sum_i W_ic^4)``: what the output matrix (D, C) contributes to PPsp; (C,) float32, computed once."""
    return _column_sums(weight, 4).sqrt()


def ppsp_unit_scores(energy: Tensor, weight_norm: Tensor, channels_per_unit: int) -> Tensor:
    """PP importance score of each unit: the L2 norm of ``C_c W_ic^2`` jointly over the unit's columns (PPsp).

    Args:
        energy: C, (C,) float32, the (fused) second moment summed over positions.
        weight_norm: (C,) float32 from :func:`ppsp_weight_norm`.
        channels_per_unit: 1 for MLP channels, d for heads, (H / G) * d for key/value groups.

    Returns:
        (U,) float32.
    """
    columns = energy * weight_norm
    return columns if channels_per_unit == 1 else torch.linalg.vector_norm(columns.view(-1, channels_per_unit), dim=1)


def energy_weight_norm(weight: Tensor) -> Tensor:
    """``sum_i W_ic^2``: what a channel's energy becomes in the block's output; (C,) float32, computed once."""
    return _column_sums(weight, 2)


def energy_unit_scores(energy: Tensor, weight_norm: Tensor, channels_per_unit: int) -> Tensor:
    """Energy that each unit adds to the block's output, its channels taken as uncorrelated: (U,) float32.

    Args:
        energy: (C,) float32, the second moment (or the variance) of each channel.
        weight_norm: (C,) float32 from :func:`energy_weight_norm`.
        channels_per_unit: 1 for MLP channels, d for heads, (H / G) * d for key/value groups.
    """
    return sum_over_units(energy * weight_norm, channels_per_unit)


def energy_about(energy: Tensor, count: Tensor | int, mean: Tensor, centre: Tensor) -> Tensor:
    """``sum (x - m)^2`` from ``sum x^2``: what is left of each channel when m is put back for it; (C,) float32.

    Args:
        energy: ``sum x^2`` over ``count`` positions, (C,) float32.
        count: how many squares were summed.
        mean: the mean of x, (C,) float32.
        centre: m, (C,) float32; the mean itself gives the variance.
    """
    return (energy - count * centre * (2 * mean - centre)).clamp(min=0.0)


def wanda_column_scores(weight: Tensor, energy: Tensor) -> Tensor:
    """Wanda-sp: ``sum_i |W_ic| * sqrt(E_c)`` (arXiv 2306.11695, whole units as in FLAP's code).

    Args:
        weight: output matrix (D, C) of any dtype.
        energy: (C,) float32, E[x^2] summed over positions.
    """
    return _column_sums(weight, 1) * energy.sqrt()


def flap_column_scores(weight: Tensor, variance: Tensor) -> Tensor:
    """FLAP's fluctuation metric WIFV: ``Var[x_c] * sum_i W_ic^2`` (arXiv 2312.11983).

    Args:
        weight: output matrix (D, C) of any dtype.
        variance: Var[x] over all real tokens, (C,) float32.
    """
    return variance * _column_sums(weight, 2)


def standardised(columns: Tensor) -> Tensor:
    """Zero mean and unit (n - 1) standard deviation over one layer's columns (C,); zeros where they are all equal."""
    centred = columns - columns.mean()
    deviation = columns.std()
    return torch.where(deviation == 0, torch.zeros_like(columns), centred / deviation)  # NaN stays NaN


def sum_over_units(columns: Tensor, channels_per_unit: int) -> Tensor:
    """Sum of column scores (C,) within each unit: (U,)."""
    return columns.view(-1, channels_per_unit).sum(1)


def _column_sums(weight: Tensor, power: int) -> Tensor:
    """``sum_i |W_ic|^power`` of a weight (D, C) of any dtype: (C,) float32, without a float32 copy of the weight."""
    total = torch.zeros(weight.shape[1], dtype=torch.float32, device=weight.device)
    for rows in weight.detach().split(_ROWS_AT_ONCE):
        total += rows.float().abs().pow(power).sum(0)
    return total
