"""GRIFFIN (arXiv 2404.01365): the prompt runs dense, and the channels that it used most serve decoding."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from pp_lightning.functional.moments import TokenPositions, sum_of_squares
from pp_lightning.functional.scores import sum_over_units
from pp_lightning.methods.base import BlockName, UnitName
from pp_lightning.methods.dynamic import ProbeObservation, WholeBatchMethod
from pp_lightning.prefill import Prefill


class Griffin(WholeBatchMethod):
    """Dynamic: a channel scores the norm, over the prompt's tokens, of its states relative to each token's own norm.

    No history and no calibration. The published code takes one row; here the rows of a batch are joined by the sum of
    their squared statistics. Without a cache there is no prompt, and the whole text chooses for itself.

    Args:
        blocks: which blocks are pruned; the published method prunes MLPs.
        attention_unit: ``query_head`` or ``kv_group``; None takes groups where query heads share key/value heads.
    """

    label: ClassVar[str] = "griffin"
    prefill: Prefill = "dense"

    def __init__(self, blocks: Sequence[BlockName] = ("mlp",), attention_unit: UnitName | None = None) -> None:
        super().__init__(blocks, attention_unit)

    def observe(
        self,
        states: Tensor,
        probe: object,
        places: TokenPositions | None,
        history: Tensor | None,
        running_mean: Tensor | None,
    ) -> ProbeObservation:
        """``sum_t (z_tc / ||z_t||)^2`` over the real tokens of all rows: what the published norm squares to."""
        wide = states.float()
        if places is not None:
            wide = torch.where(places.real[..., None], wide, 0.0)
        norms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        relative = torch.where(norms > 0, wide / norms, 0.0)
        return ProbeObservation(sum_of_squares(relative).sum(0))

    def weight_norm(self, weight: Tensor) -> Tensor:
        """The output matrix has no part in it: ones (C,) float32."""
        return torch.ones(weight.shape[1], device=weight.device)

    def unit_scores(self, energy: Tensor, weight_norm: Tensor, channels_per_unit: int) -> Tensor:
        """Scores (U,) of a block's units; a head has those of its channels together."""
        return sum_over_units(energy, channels_per_unit)
