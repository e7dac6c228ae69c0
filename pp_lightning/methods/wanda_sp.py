"""Wanda-sp: structured Wanda, weight magnitude times activation norm (arXiv 2306.11695)."""

from typing import ClassVar

from torch import Tensor

from pp_lightning.functional.scores import sum_over_units, wanda_column_scores
from pp_lightning.methods.base import BlockToPrune, StaticMethod
from pp_lightning.statistics import Statistics


class WandaSP(StaticMethod[Statistics]):
    """Static: a column scores ``sum_i |W_ic| sqrt(E[x_c^2])``, a head the sum of its columns; uniform ratios.

    Args:
        blocks: which blocks are pruned, ``attention``, ``mlp`` or both.
        attention_unit: ``query_head`` or ``kv_group``; None takes groups where query heads share key/value heads.
    """

    label: ClassVar[str] = "wanda_sp"

    def unit_scores(self, block: BlockToPrune, calibration_data: Statistics) -> Tensor:
        """Scores (U,) float32 of a block's units."""
        weight = block.weight
        columns = wanda_column_scores(weight, calibration_data.energy(*block.key).to(weight.device))
        return block.checked(sum_over_units(columns, block.units.channels))
