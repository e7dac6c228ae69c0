"""Second moments per position and channel: of the probe, of the history, and the two fused.

Probe Pruning (arXiv 2502.15618), history-informed pruning: importance-scaled fusion and the history's update.

A *moment* is (P, C) float32: the mean of X^2 over the rows that are real at a position. Without padding, position and
column are the same and everything is a plain mean over rows. With padding, tokens are gathered at their position
ids, so the same rows give the same moments wherever their padding is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pp_lightning.functional.draws import ScatteredProbe
from pp_lightning.functional.probe import Probe
from pp_lightning.functional.tracing import is_traced


@dataclass(frozen=True)
class TokenPositions:
    """Where the tokens of a padded (or explicitly positioned) tensor belong.

    Attributes:
        positions: (B, S) int64 position ids; any value at places that are not real.
        real: (B, S) bool, True at real tokens.
        num_positions: P; every real position id is below it.
    """

    positions: Tensor
    real: Tensor
    num_positions: int

    def to(self, device: torch.device) -> "TokenPositions":
        """The same for a layer on another device; itself where it is there."""
        if self.real.device == device:
            return self
        return TokenPositions(self.positions.to(device), self.real.to(device), self.num_positions)


def second_moment(states: Tensor) -> Tensor:
    """Mean over rows of X^2: (B, S, C) of any dtype to (S, C) float32."""
    return sum_of_squares(states).div_(states.shape[0])


def sum_of_squares(states: Tensor) -> Tensor:
    """Sum over rows of X^2: (B, S, C) of any dtype to (S, C) float32."""
    if is_traced():
        return states.float().square().sum(0)  # fused into one loop: no temporary
    if states.device.type != "cpu":
        return sum_of_squares_at_once(states)
    if len(states) == 1:
        return states[0].float().square()
    # Row by row: no float32 copy of the states, which can be the largest tensor of a block, and on a CPU many times
    # faster than a norm or a sum over the first dimension.
    total = torch.zeros(states.shape[1:], dtype=torch.float32, device=states.device)
    for row in states:
        wide = row.float()
        total.addcmul_(wide, wide)
    return total


def sum_of_squares_about(states: Tensor, centre: Tensor) -> Tensor:
    """Sum over rows of (X - m)^2: (B, S, C) of any dtype, m (C,) float32, to (S, C) float32."""
    if states.device.type != "cpu":
        return (states.float() - centre).square().sum(0)
    total = torch.zeros(states.shape[1:], dtype=torch.float32, device=states.device)
    for row in states:  # see above
        moved = row.float() - centre
        total.addcmul_(moved, moved)
    return total


def sum_of_squares_at_once(states: Tensor) -> Tensor:
    """The same sum in one pass, which an accelerator is asked for once: (B, S, C) of any dtype to (S, C) float32."""
    exact = states.float() if states.dtype == torch.float64 else states
    return torch.linalg.vector_norm(exact, dim=0, dtype=torch.float32).square()


def placed_second_moment(states: Tensor, places: TokenPositions) -> tuple[Tensor, Tensor]:
    """Mean of X^2 over the real tokens at each position.

    Args:
        states: (B, S, C) of any dtype; anything, even NaN, where not real.
        places: positions and real tokens of ``states``.

    Returns:
        The moment (P, C) float32, zero where a position has no real token, and the number of tokens (P,) float32.
    """
    count = placed_count(places)
    return placed_sum(states.float().square(), places) / count.clamp(min=1.0)[:, None], count


def placed_sum(values: Tensor, places: TokenPositions) -> Tensor:
    """Sum over the real tokens at each position: (B, S, C) to (P, C) float32."""
    real, index = _flat(places)
    summands = torch.where(real[:, None], values.flatten(0, 1).float(), 0.0)
    return summands.new_zeros(places.num_positions, values.shape[-1]).index_add(0, index, summands)


def placed_count(places: TokenPositions) -> Tensor:
    """Number of real tokens at each position: (P,) float32."""
    real, index = _flat(places)
    summands = real.float()
    return summands.new_zeros(places.num_positions).index_add(0, index, summands)


def _flat(places: TokenPositions) -> tuple[Tensor, Tensor]:
    real = places.real.flatten()
    return real, torch.where(real, places.positions.flatten(), 0)


def positions_held(places: TokenPositions, columns: Tensor, column_valid: Tensor) -> Tensor:
    """Positions that the given columns hold in any real row of the batch: (P,) bool.

    Args:
        places: of the whole batch.
        columns: (s,) int64.
        column_valid: (s,) bool; other columns are left out.
    """
    held = TokenPositions(places.positions[:, columns], places.real[:, columns] & column_valid, places.num_positions)
    return placed_count(held) > 0


def fuse(probe: Tensor, history: Tensor, fusion_weight: float | None) -> Tensor:
    """The probe's moment fused with the history's, elementwise: ``w P + (1 - w) H``.

    Args:
        probe: P, float32 of any shape, not negative.
        history: H, same shape.
        fusion_weight: w, the weight of the probe. None scales by importance, ``w = P / (P + H)`` (0 where both are 0),
            so that the larger of the two dominates.
    """
    if fusion_weight is not None:
        return torch.lerp(history, probe, fusion_weight)
    total = probe + history
    # w P + (1 - w) H with w = P / (P + H) is P + H - 2 P H / (P + H)
    shared = history.div(total.clamp(min=torch.finfo(total.dtype).tiny)).mul_(probe)
    return total.sub_(shared, alpha=2.0)


# Positions whose moments are fused at a time on a CPU: what is between sum and score stays in its cache. 128 x 5632
# take half the time.
_TOGETHER = 32


def _fused_sum(states: Tensor, history: Tensor, fusion_weight: float | None) -> Tensor:
    """The moment of (b, s, C) fused with a history (s, C), summed over positions: (C,) float32."""
    if is_traced() or states.device.type != "cpu":
        return fuse(second_moment(states), history, fusion_weight).sum(0)
    total = torch.zeros(states.shape[2], dtype=torch.float32)
    for part, here in zip(states.split(_TOGETHER, 1), history.split(_TOGETHER), strict=True):
        total += fuse(second_moment(part), here, fusion_weight).sum(0)
    return total


def fused_energy(
    states: Tensor,
    probe: Probe | ScatteredProbe | None,
    places: TokenPositions | None,
    history: Tensor,
    fusion_weight: float | None,
) -> tuple[Tensor, Tensor | int]:
    """The probe's second moment fused with the history at the probe's positions, summed over them.

    A position that the probe has no real token at is left to the history.

    Args:
        states: the probe's states, (b, s, C).
        probe: where in the batch they come from; None where they are the whole batch's.
        places: positions of the whole batch; None where columns are positions and nothing is padding.
        history: (P_max, C) float32.
        fusion_weight: weight of the probe; None scales by importance.

    Returns:
        The sum (C,) float32, and how many positions were summed.
    """
    if places is None:
        here = history[: states.shape[1]] if probe is None else history[probe.tokens]
        return _fused_sum(states, here, fusion_weight), states.shape[1]
    if probe is None:
        moment, count = placed_second_moment(states, places)
        held = count > 0
        fused = fuse(moment, history[: places.num_positions], fusion_weight)
        return torch.where(held[:, None], fused, 0.0).sum(0), held.sum()
    assert probe.real is not None
    positions = probe.take(places.positions)
    if isinstance(probe, ScatteredProbe):
        real = probe.real[0]
        fused = fuse(states[0].float().square(), history[torch.where(real, positions[0], 0)], fusion_weight)
        return torch.where(real[:, None], fused, 0.0).sum(0), real.sum()
    assert probe.real_tokens is not None
    moment, count = placed_second_moment(states, TokenPositions(positions, probe.real, places.num_positions))
    selected = positions_held(places, probe.tokens, probe.real_tokens)
    here = history[: places.num_positions]
    fused = torch.where(count[:, None] > 0, fuse(moment, here, fusion_weight), here)
    return (fused * selected[:, None]).sum(0), selected.sum()


def update_history_(history: Tensor, moment: Tensor, kept: Tensor, momentum: float, present: Tensor | None) -> None:
    """Move the history towards a batch's moment, in place: ``H = m H + (1 - m) X^2``.

    Args:
        history: (P_max, C) float32.
        moment: (P, K) float32 at positions 0..P-1, of the kept channels.
        kept: (K,) int64 ascending channels that ``moment`` describes.
        momentum: m.
        present: (P,) bool, positions that had a real token; others stay as they are. None means all.
    """
    rows = history[: moment.shape[0]]
    old = rows.index_select(1, kept)
    new = torch.lerp(moment, old, momentum)
    if present is not None:
        new = torch.where(present[:, None], new, old)
    rows.index_copy_(1, kept, new)


def all_finite(moments: Sequence[Tensor]) -> Tensor:
    """Whether second moments, which are not negative, are finite everywhere: a bool scalar on the first one's device.

    Args:
        moments: (P, K) float32 each, of any device.
    """
    device = moments[0].device
    return torch.stack([moment.flatten().amax(0).to(device, non_blocking=True) for moment in moments]).isfinite().all()
