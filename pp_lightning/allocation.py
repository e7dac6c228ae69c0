"""How the removed units are spread over the layers: the same in each, or by one ranking over all of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from pp_lightning.blocks import Block, BlockPlan
from pp_lightning.errors import UserError
from pp_lightning.functional.allocation import Removable, allocate, floor_count, relative_output_losses
from pp_lightning.methods.base import AllocationName, PruningMethod
from pp_lightning.plan import Plan
from pp_lightning.statistics import BlockKey, Statistics


@dataclass(frozen=True)
class Evidence:
    """What an allocation may look at.

    Attributes:
        statistics: of the dense model; None where there are none.
        output_weights: the output matrix (D, C) of every block of the model, the skipped layers' included.
        restores_means: whether the method puts back the mean of what it removes: then only deviations from it are lost.
        floor: fraction of its units that every block keeps, in [0, 1].
    """

    statistics: Statistics | None
    output_weights: Mapping[BlockKey, Tensor]
    restores_means: bool
    floor: float


def spread(
    plan: Plan,
    method: PruningMethod,
    output_weights: Mapping[BlockKey, Tensor],
    statistics: Statistics | None,
    allocation: AllocationName | None,
    floor: float,
) -> tuple[Plan, dict[BlockKey, int]]:
    """The layers that are pruned, and the units that stay in each of their blocks.

    Args:
        plan: uniform counts.
        method: says how its units are spread where ``allocation`` is None.
        output_weights: the output matrix (D, C) of every block of the model.
        statistics: of the dense model; None where there are none.
        allocation: ``uniform`` or ``global``.
        floor: fraction of its units that every block keeps under ``global``.

    Raises:
        UserError: no such allocation, the method has its own, or the allocation cannot be made.
    """
    name = method.allocation if allocation is None else allocation
    if name not in ALLOCATIONS:
        raise UserError(f"allocation must be {' or '.join(ALLOCATIONS)}, not {name!r}")
    if name != "uniform" and method.allocates:
        raise UserError(f"{type(method).__name__} spreads units over the layers itself: leave allocation out")
    return ALLOCATIONS[name](plan, Evidence(statistics, output_weights, method.restores_means, floor))


Allocation = Callable[[Plan, Evidence], tuple[Plan, dict[BlockKey, int]]]


def uniform(plan: Plan, evidence: Evidence) -> tuple[Plan, dict[BlockKey, int]]:
    """The plan's counts in each layer that is not skipped."""
    return plan, {(layer, block.block): block.keep for layer in plan.layers for block in plan.blocks}


def by_global_ranking(plan: Plan, evidence: Evidence) -> tuple[Plan, dict[BlockKey, int]]:
    """Counts by what units are worth, over all layers, none skipped, that save as many FLOPs as the plan would.

    A unit is worth what its loss adds to its block's output relative to the residual, as the calibration set has it
    (:func:`~pp_lightning.functional.allocation.relative_output_losses`), for each FLOP that it takes in a text as long
    as the calibrated windows.

    Args:
        plan: the uniform plan whose saving is matched.
        evidence: statistics of all layers, with means where means are restored.

    Returns:
        A plan over all layers, and the units that stay in each block.

    Raises:
        UserError: statistics are missing, or do not cover what is needed; the floor is out of range, or leaves too
            little to remove.
    """
    statistics, plans = evidence.statistics, {block.block: block for block in plan.blocks}
    if statistics is None:
        raise UserError("allocation=global needs calibration statistics: pass the result of calibrate()")
    check_floor(plan, len(evidence.output_weights) // len(plans), evidence.floor, statistics.num_positions)
    cost = {name: unit_flops(block, statistics.num_positions) for name, block in plans.items()}
    to_save = sum((block.units.number - block.keep) * cost[name] for name, block in plans.items()) * len(plan.layers)
    keep = {key: plans[key[1]].units.number for key in evidence.output_weights}
    keys = [key for key in keep if plans[key[1]].ratio > 0]
    removable = [_removable(plans[key[1]], cost[key[1]], key, evidence, statistics) for key in keys]
    keep |= dict(zip(keys, allocate(removable, to_save), strict=True))
    return replace(plan, layers=tuple(sorted({layer for layer, _ in keep}))), keep


def check_floor(plan: Plan, num_layers: int, floor: float, tokens: int) -> None:
    """Refuse a floor under which less can go than uniform counts would save: no statistics are needed to see that.

    Args:
        plan: uniform counts.
        num_layers: layers of the model, those that the plan skips included.
        floor: fraction of its units that every block keeps under ``global``.
        tokens: length of a text.

    Raises:
        UserError: the floor is out of range, or leaves too little to remove.
    """
    if not 0.0 <= floor <= 1.0:
        raise UserError(f"floor is the fraction that every block keeps and must be in [0, 1], not {floor}")
    most, to_save = 0, 0
    for block in plan.blocks:
        number, cost = block.units.number, unit_flops(block, tokens)
        to_save += (number - block.keep) * cost * len(plan.layers)
        if block.ratio > 0:
            most += (number - floor_count(number, floor, block.round_to)) * cost * num_layers
    if most < to_save:
        raise UserError(f"keeping {floor:.0%} of every block leaves too little to remove: lower floor or pruning_ratio")


def unit_flops(plan: BlockPlan, tokens: int) -> int:
    """FLOPs that one unit takes for each token of a text of ``tokens`` tokens."""
    products = 4 * tokens * plan.units.channels if plan.block is Block.ATTENTION else 0
    return 2 * plan.units.cost + products


def _removable(plan: BlockPlan, cost: int, key: BlockKey, evidence: Evidence, statistics: Statistics) -> Removable:
    weight = evidence.output_weights[key]
    losses = relative_output_losses(
        weight,
        statistics.second_moment(*key).to(weight.device),
        statistics.means(*key).to(weight.device) if evidence.restores_means else None,
        statistics.residual_energy(*key).to(weight.device),
        statistics.counts.to(weight.device),
        plan.units.channels,
    )
    return Removable(losses, cost, plan.round_to, floor_count(plan.units.number, evidence.floor, plan.round_to))


ALLOCATIONS: Mapping[str, Allocation] = {"uniform": uniform, "global": by_global_ranking}
