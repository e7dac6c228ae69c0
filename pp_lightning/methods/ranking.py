"""One ranking of the units of all blocks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pp_lightning.methods.base import BlockToPrune


def ranked_counts(blocks: Sequence[BlockToPrune], scores: Sequence[Tensor], *, by_cost: bool = True) -> list[int]:
    """Units that stay in each block when the lowest scores of all blocks go first, until the budget is spent.

    The budget is what uniform counts take away: of weights, or, without ``by_cost``, of units. Counts are rounded as
    everywhere, up to multiples of ``round_to``. Blocks that are alike take no part.

    Args:
        blocks: one of each scores.
        scores: (U,) each, comparable between blocks.
        by_cost: a unit costs its weights; without, all cost the same.
    """
    ranked = [(block, block.counted(own)) for block, own in zip(blocks, scores, strict=True) if not block.plan.alike]
    if not ranked:
        return [block.plan.keep for block in blocks]
    costs = [block.units.cost if by_cost else 1 for block, _ in ranked]
    budget = sum(block.plan.ratio * block.units.number * cost for (block, _), cost in zip(ranked, costs, strict=True))
    owner = torch.cat([torch.full((len(own),), index) for index, (_, own) in enumerate(ranked)])
    order = torch.cat([own.double().cpu() for _, own in ranked]).argsort(stable=True)
    spent = torch.tensor(costs, dtype=torch.float64)[owner[order]].cumsum(0)
    lost = owner[order[spent <= budget]].bincount(minlength=len(ranked)).tolist()
    counts = iter(block.rounded(block.units.number - gone) for (block, _), gone in zip(ranked, lost, strict=True))
    return [block.plan.keep if block.plan.alike else next(counts) for block in blocks]
