"""How the removed units are spread over the layers: the same in each, or by one ranking over all of them."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pp_lightning.blocks import Block, BlockKey, BlockPlan
from pp_lightning.errors import UserError
from pp_lightning.functional.allocation import Removable, allocate, floor_count, relative_output_losses
from pp_lightning.functional.budget import kept_channels
from pp_lightning.functional.scores import energy_weight_norm
from pp_lightning.methods.base import AllocationName, PruningMethod
from pp_lightning.plan import Plan
from pp_lightning.statistics import Statistics

# What every block keeps unless the user says, the first that lets enough go. Losses are added up as if they did not
# interact, which is furthest from the truth where little of a block is left, in attention most (docs/beyond.md).
FLOORS: tuple[Mapping[Block, float], ...] = (
    {Block.ATTENTION: 0.35, Block.MLP: 0.25},
    {Block.ATTENTION: 0.25, Block.MLP: 0.25},
)


@dataclass(frozen=True)
class AllocationInputs:
    """What an allocation may look at.

    Attributes:
        statistics: of the dense model; None where there are none.
        output_weights: the output matrix (D, C) of every block of the model, the skipped layers' included.
        restores_means: whether the method puts back the mean of what it removes: then only deviations from it are lost.
        floor: fraction of its units that every block keeps, in [0, 1]; None takes :data:`FLOORS`.
        losses: of every block's units (U,) where those that stay take over what goes; None where they do not.
        over: makes of a block's losses those that all processes count units by, where several share the model.
    """

    statistics: Statistics | None
    output_weights: Mapping[BlockKey, Tensor]
    restores_means: bool
    floor: float | None
    losses: Mapping[BlockKey, Tensor] | None = None
    over: Callable[[Tensor], Tensor] | None = None

    def counted(self, losses: Tensor) -> Tensor:
        """The losses (U,) that units are counted by."""
        return losses if self.over is None else self.over(losses)


def spread(
    plan: Plan,
    method: PruningMethod,
    output_weights: Mapping[BlockKey, Tensor],
    statistics: Statistics | None,
    allocation: AllocationName | None,
    floor: float | None,
    losses: Mapping[BlockKey, Tensor] | None = None,
    over: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Plan, dict[BlockKey, int]]:
    """The layers that are pruned, and the units that stay in each of their blocks.

    ``floor``, ``losses`` and ``over`` are those of :class:`AllocationInputs`.
    """
    name = method.allocation if allocation is None else allocation
    if name == "searched":
        raise UserError("allocation=searched moves units by what is lost after an update: give update too")
    if name not in ALLOCATIONS:
        *others, last = ALLOCATIONS
        raise UserError(f"allocation must be {', '.join(others)} or {last}, not {name!r}")
    if name != "uniform" and method.allocates:
        raise UserError(f"{type(method).__name__} spreads units over the layers itself: leave allocation out")
    return ALLOCATIONS[name](
        plan, AllocationInputs(statistics, output_weights, method.restores_means, floor, losses, over)
    )


Allocation = Callable[[Plan, AllocationInputs], tuple[Plan, dict[BlockKey, int]]]


def uniform(plan: Plan, inputs: AllocationInputs) -> tuple[Plan, dict[BlockKey, int]]:
    """The plan's counts in each layer that is not skipped."""
    keys = ((layer, block) for layer in plan.layers for block in plan.blocks)
    return plan, {(i, b.block): b.keep for i, b in keys if (i, b.block) in inputs.output_weights}


def by_global_ranking(plan: Plan, inputs: AllocationInputs) -> tuple[Plan, dict[BlockKey, int]]:
    """Counts by what units are worth, over all layers, none skipped, that save as much of the budget as the plan would.

    A unit is worth what its loss adds to its block's output relative to the residual, as the calibration set has it
    (:func:`~pp_lightning.functional.allocation.relative_output_losses`), for each FLOP that it takes in a text as long
    as the calibrated windows.

    Raises:
        UserError: statistics are missing, or do not cover what is needed; the floor is out of range, or leaves too
            little to remove.
    """
    statistics, plans = inputs.statistics, {block.block: block for block in plan.blocks}
    if statistics is None:
        raise UserError("allocation=global needs calibration statistics: pass the result of calibrate()")
    weights, tokens = inputs.output_weights, plan.counted_tokens(statistics.num_positions)
    floors = settled_floors(plan, weights.keys(), inputs.floor, statistics.num_positions)
    cost = {name: unit_flops(block, tokens) for name, block in plans.items()}
    to_save = _to_save(plan, weights.keys(), tokens)
    keep = {key: plans[key[1]].keep if plans[key[1]].alike else plans[key[1]].units.number for key in weights}
    keys = [key for key in keep if _is_ranked(plans[key[1]])]
    removable = [_removable(plans[key[1]], cost[key[1]], floors[key[1]], key, inputs, statistics) for key in keys]
    keep |= dict(zip(keys, allocate(removable, to_save), strict=True))
    return replace(plan, layers=tuple(sorted({layer for layer, _ in keep}))), keep


def settled_floors(plan: Plan, keys: Collection[BlockKey], floor: float | None, tokens: int) -> Mapping[Block, float]:
    """Fractions that every attention and every MLP block keeps. No statistics are needed to see whether they can.

    Args:
        plan: uniform counts.
        keys: every block of the model, those of layers that the plan skips included.
        floor: for both kinds of blocks; None takes the first of :data:`FLOORS` that lets enough go.
        tokens: length of a text.
    """
    if floor is not None and not 0.0 <= floor <= 1.0:
        raise UserError(f"floor is the fraction that every block keeps and must be in [0, 1], not {floor}")
    plans, tokens = {block.block: block for block in plan.blocks}, plan.counted_tokens(tokens)
    costs = {name: unit_flops(block, tokens) for name, block in plans.items()}
    candidates = FLOORS if floor is None else (dict.fromkeys(Block, floor),)
    for floors in candidates:
        least = {n: floor_count(one.units.number, floors[n], one.round_to) for n, one in plans.items()}
        removable = sum((plans[n].units.number - least[n]) * costs[n] for _, n in keys if _is_ranked(plans[n]))
        if removable >= _to_save(plan, keys, tokens):
            return floors
    lowest = min(candidates[-1].values())
    raise UserError(f"keeping {lowest:.0%} of every block leaves too little to remove: lower floor or pruning_ratio")


def _to_save(plan: Plan, keys: Collection[BlockKey], tokens: int) -> int:
    """What ranked blocks save for each token of a text of ``tokens`` tokens: as uniform counts do, or as asked."""
    saved = {one.block: (one.units.number - one.keep) * unit_flops(one, tokens) for one in plan.blocks}
    if plan.stays is None:
        ranked = {one.block for one in plan.blocks if _is_ranked(one)}
        return sum(saved[block] for layer, block in keys if layer in plan.layers and block in ranked)
    whole = {one.block: one.units.number * unit_flops(one, tokens) for one in plan.blocks}
    alike = {one.block for one in plan.blocks if one.alike}  # saved already, in the same numbers in every layer
    asked = math.ceil((1 - plan.stays) * sum(whole[block] for _, block in keys))
    return max(0, asked - sum(saved[block] for _, block in keys if block in alike))


def _is_ranked(plan: BlockPlan) -> bool:
    return plan.ratio > 0 and not plan.alike


def unit_flops(plan: BlockPlan, tokens: int) -> int:
    """FLOPs that one unit takes for each token of a text of ``tokens`` tokens; of 0 tokens, two for each weight."""
    products = 4 * tokens * plan.units.channels if plan.block is Block.ATTENTION else 0
    return 2 * plan.units.cost + products


def _removable(
    plan: BlockPlan, cost: int, floor: float, key: BlockKey, inputs: AllocationInputs, statistics: Statistics
) -> Removable:
    least = floor_count(plan.units.number, floor, plan.round_to)
    if inputs.losses is not None:
        return Removable(inputs.losses[key], cost, plan.round_to, least)
    weight = inputs.output_weights[key]
    lost = statistics.deviations(*key) if inputs.restores_means else statistics.second_moment(*key)
    losses = relative_output_losses(
        weight,
        lost.to(weight.device),
        statistics.residual_energy(*key).to(weight.device),
        statistics.counts.to(weight.device),
        plan.units.channels,
    )
    return Removable(inputs.counted(losses), cost, plan.round_to, least)


# Of outlier-weighed ratios (OWL, arXiv 2310.05175): a channel is an outlier that is so many times its block's mean, and
# ratios spread by so much around the asked one.
_OUTLIER, _SPREAD = 5.0, 0.08


def by_outliers(plan: Plan, inputs: AllocationInputs) -> tuple[Plan, dict[BlockKey, int]]:
    """Ratios per layer, of the same mean: layers with more of their output's energy in outliers keep more."""
    statistics = inputs.statistics
    if statistics is None:
        raise UserError("allocation=outliers needs calibration statistics: pass the result of calibrate()")
    plan, keep = uniform(plan, inputs)
    for block in (one for one in plan.blocks if _is_ranked(one)):
        keys = [key for key in keep if key[1] is block.block]
        own = (outlier_share(_output_energy(key, inputs, statistics)) for key in keys)
        shares = torch.cat([inputs.counted(torch.tensor([share])) for share in own])
        ratios = spread_ratios(block.ratio, shares, _SPREAD)
        for key, ratio in zip(keys, ratios.tolist(), strict=True):
            keep[key] = kept_channels(block.units.number, ratio, block.round_to)  # of heads too
    return plan, keep


def _output_energy(key: BlockKey, inputs: AllocationInputs, statistics: Statistics) -> Tensor:
    weight = inputs.output_weights[key]
    return statistics.energy(*key).to(weight.device) * energy_weight_norm(weight)


def outlier_share(energies: Tensor) -> float:
    """Fraction of the energies (C,) float32 that are more than :data:`_OUTLIER` times their mean."""
    return float((energies > _OUTLIER * energies.mean()).float().mean())


def spread_ratios(ratio: float, shares: Tensor, spread: float) -> Tensor:
    """Ratios (L,) around ``ratio``, which is their mean, lower where the share (L,) of outliers is larger."""
    width = float(shares.max() - shares.min())
    if width == 0.0:
        return torch.full_like(shares, ratio)
    more = (shares - shares.min()) / width * 2 * spread
    return (ratio - (more - more.mean())).clamp(0.0, 1.0)


ALLOCATIONS: Mapping[str, Allocation] = {"uniform": uniform, "global": by_global_ranking, "outliers": by_outliers}
