"""What a probe's states say about each channel, with the history's help."""

import torch
from torch import Tensor

from pp_lightning.functional.draws import ScatteredProbe
from pp_lightning.functional.moments import Places, fuse, placed_second_moment, positions_held, second_moment
from pp_lightning.functional.probe import Probe


def fused_energy(
    states: Tensor, probe: Probe | ScatteredProbe, places: Places | None, history: Tensor, fusion_weight: float | None
) -> tuple[Tensor, Tensor | int]:
    """The probe's second moment fused with the history at the probe's positions, summed over them (01-method, step 4).

    A position that the probe has no real token at is left to the history.

    Args:
        states: the probe's states, (b, s, C).
        probe: where in the batch they come from.
        places: positions of the whole batch; None where columns are positions and nothing is padding.
        history: (P_max, C) float32.
        fusion_weight: weight of the probe; None scales by importance.

    Returns:
        The sum (C,) float32, and how many positions were summed.
    """
    if places is None:
        return fuse(second_moment(states), history[probe.tokens], fusion_weight).sum(0), len(probe.tokens)
    assert probe.real is not None
    positions = probe.take(places.positions)
    if isinstance(probe, ScatteredProbe):
        real = probe.real[0]
        fused = fuse(states[0].float().square(), history[torch.where(real, positions[0], 0)], fusion_weight)
        return torch.where(real[:, None], fused, 0.0).sum(0), real.sum()
    assert probe.real_tokens is not None
    moment, count = placed_second_moment(states, Places(positions, probe.real, places.num_positions))
    selected = positions_held(places, probe.tokens, probe.real_tokens)
    here = history[: places.num_positions]
    fused = torch.where(count[:, None] > 0, fuse(moment, here, fusion_weight), here)
    return (fused * selected[:, None]).sum(0), selected.sum()
