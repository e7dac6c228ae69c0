"""From the importance of each projection's rows or columns to that of the units that own them.

The members of a block are its projections: rows of query, key and value (or gate and up), columns of the output matrix.
Where query heads share key/value heads, a unit (one key/value head with its query heads) owns more rows of some members
than of others. transformers puts consecutive query heads under one key/value head, so a member reshapes to its units.
"""

from collections.abc import Sequence
from enum import StrEnum

import torch
from torch import Tensor


class Reduction(StrEnum):
    """How the members of a block are combined, channel by channel."""

    SUM = "sum"
    MEAN = "mean"
    MAX = "max"
    PROD = "prod"


def reduced_unit_scores(members: Sequence[Tensor], num_units: int, reduction: Reduction) -> Tensor:
    """Combine the members channel by channel, then add up each unit's channels (LLM-Pruner).

    Args:
        members: one vector a projection, (U * n,) float32, n may differ between them. The longer ones are folded to the
            shortest: what consecutive query heads contribute to one key/value head is added up.
        num_units: U.
        reduction: over members.

    Returns:
        (U,) float32.
    """
    width = min(len(member) for member in members) // num_units
    folded = torch.stack([member.view(num_units, -1, width).sum(1) for member in members])
    return _reduced(folded, reduction).sum(1)


def normalised_unit_scores(members: Sequence[Tensor], num_units: int) -> Tensor:
    """Add up each unit's channels, bring each member to unit length, and add the members (LoRAPrune).

    Args:
        members: one vector a projection, (U * n,) float32, n may differ between them.
        num_units: U.

    Returns:
        (U,) float32.
    """
    sums = [member.view(num_units, -1).sum(1) for member in members]
    return torch.stack([s / (torch.linalg.vector_norm(s) + 1e-8) for s in sums]).sum(0)


def _reduced(stacked: Tensor, reduction: Reduction) -> Tensor:
    match reduction:
        case Reduction.SUM:
            return stacked.sum(0)
        case Reduction.MEAN:
            return stacked.mean(0)
        case Reduction.MAX:
            return stacked.amax(0)
        case Reduction.PROD:
            return stacked.prod(0)
