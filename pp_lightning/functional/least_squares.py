"""Kept columns take over what removed ones did: least squares on second moments.

For an output matrix W (D, C) and states x (C,) at its input, with kept channels K and removed ones R, the columns
``W'_K = W_K + W_R S_RK (S_KK + r s I)^-1`` come nearest to ``W x`` over the calibration tokens. S is E[x x^T], s its
mean diagonal and r the ridge. About the mean, with E[x] taken into a bias, it is what OSSCAR and ZipLM solve, and
optimal brain surgery with the choice already made.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_ROWS_AT_ONCE = 4096


class SecondMoments:
    """Sums over tokens of states and of their products.

    Products are taken in the states' own precision, float32 or better, a few thousand tokens at a time, and added up in
    float64.

    Attributes:
        count: tokens so far.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        self.count = 0
        self._sum = torch.zeros(channels, dtype=torch.float64, device=device)
        self._products = torch.zeros(channels, channels, dtype=torch.float64, device=device)

    def add(self, states: Tensor) -> None:
        """Take in states (N, C) of any dtype."""
        for rows in states.split(_ROWS_AT_ONCE):
            wide = rows if rows.dtype == torch.float64 else rows.float()
            self.count += len(rows)
            self._sum += wide.sum(0, dtype=torch.float64)
            self._products += wide.t() @ wide

    @property
    def mean(self) -> Tensor:
        """E[x], (C,) float64."""
        return self._sum / self.count

    def matrix(self, *, about_mean: bool = False) -> Tensor:
        """E[x x^T], or the covariance: (C, C) float64."""
        mean = self.mean
        return torch.addr(self._products / self.count, mean, mean, alpha=-1.0 if about_mean else 0.0)


def solve_kept(weight: Tensor, moments: Tensor, kept: Tensor, ridges: Sequence[float]) -> list[Tensor]:
    """The kept columns with what the removed ones did, for each ridge.

    Args:
        weight: W, (D, C) of any dtype.
        moments: S, (C, C) float64.
        kept: K, (K,) int64 ascending channels, not all of them.
        ridges: r, each a fraction of the mean diagonal of S.

    Returns:
        W'_K, (D, K) float64, in the order of the ridges.

    Raises:
        torch.linalg.LinAlgError: S_KK with its ridge is singular, or not finite.
    """
    wide = weight.detach().double()
    is_removed = torch.ones(len(moments), dtype=torch.bool, device=kept.device).index_fill(0, kept, False)
    removed = is_removed.nonzero()[:, 0]
    within, moved = moments[kept][:, kept], moments[kept][:, removed] @ wide[:, removed].t()
    size = moments.diagonal().mean()
    solved = []
    for ridge in ridges:
        ridged = within.clone()
        ridged.diagonal().add_(ridge * size)
        solved.append(wide[:, kept] + torch.cholesky_solve(moved, torch.linalg.cholesky(ridged)).t())
    return solved


def ordered_factor(moments: Tensor, order: Tensor, ridge: float) -> Tensor:
    """L of S = L L^T, with channels in the order in which they stay: it holds the update of every count.

    Args:
        moments: S, (C, C) float64.
        order: (C,) int64, the channel that stays longest first.
        ridge: as a fraction of the mean diagonal of S.

    Returns:
        (C, C) float64, lower triangular, in the order of ``order``.

    Raises:
        torch.linalg.LinAlgError: S with its ridge is singular, or not finite.
    """
    ordered = moments[order][:, order]
    ordered.diagonal().add_(ridge * moments.diagonal().mean())
    return torch.linalg.cholesky(ordered)


def losses_in_order(weight: Tensor, order: Tensor, factor: Tensor) -> Tensor:
    """What each channel's loss adds to the squared error of ``W x``, where those that stay take over what they can.

    Channels go from the end of ``order``: those from j on leave ``||(W L)_{j..}||^2`` behind, whatever j is.

    Args:
        weight: W, (D, C) of any dtype.
        order: (C,) int64, the channel that stays longest first.
        factor: L, from :func:`ordered_factor`.

    Returns:
        (C,) float64, in the order of ``order``.
    """
    return (weight.detach().double()[:, order] @ factor).square().sum(0)


def columns_in_order(weight: Tensor, order: Tensor, factor: Tensor, count: int) -> Tensor:
    """The first ``count`` columns with what the others did: ``W'_K = W_K + W_R L_RK L_KK^-1``, as S_RK = L_RK L_KK^T.

    Args:
        weight: W, (D, C) of any dtype.
        order: (C,) int64, the channel that stays longest first.
        factor: L, from :func:`ordered_factor`.
        count: K, how many stay.

    Returns:
        W'_K, (D, K) float64, in the order of ``order``.
    """
    wide = weight.detach().double()[:, order]
    moved = wide[:, count:] @ factor[count:, :count]
    within = factor[:count, :count]
    return wide[:, :count] + torch.linalg.solve_triangular(within, moved, upper=False, left=False)


def squared_error(weight: Tensor, columns: Tensor, kept: Tensor, states: Tensor, bias: Tensor | None = None) -> float:
    """Sum over states (N, C) of ``||W x - W'_K x_K - b||^2``: what a new matrix does to tokens it was not made of.

    Args:
        weight: W, (D, C).
        columns: W'_K, (D, K).
        kept: K, (K,) int64.
        states: (N, C) of any dtype.
        bias: b, (D,), or None.
    """
    lost = weight.detach().float().index_add(1, kept, columns.float(), alpha=-1.0)
    offset = torch.zeros(len(weight), device=weight.device) if bias is None else bias.float()
    parts = states.float().split(_ROWS_AT_ONCE)
    return sum(float((rows @ lost.t() - offset).square().sum(dtype=torch.float64)) for rows in parts)
