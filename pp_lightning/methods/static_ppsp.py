"""Static PPsp: the Probe Pruning score without a probe, taken once from the calibration history."""

from typing import ClassVar

from torch import Tensor

from pp_lightning.functional.scores import ppsp_unit_scores, ppsp_weight_norm
from pp_lightning.methods.base import BlockToPrune, StaticMethod
from pp_lightning.statistics import Statistics


class StaticPPsp(StaticMethod[Statistics]):
    """Static: units score ``||E[x_c^2] W_ic^2||_2`` over the calibration set; uniform ratios.

    Args:
        blocks: which blocks are pruned, ``attention``, ``mlp`` or both.
        attention_unit: ``query_head`` or ``kv_group``; None takes groups where query heads share key/value heads.
    """

    label: ClassVar[str] = "ppsp"

    def unit_scores(self, block: BlockToPrune, calibration_data: Statistics) -> Tensor:
        """Scores (U,) float32 of a block's units."""
        weight = block.weight
        energy = calibration_data.energy(*block.key).to(weight.device)
        return block.checked(ppsp_unit_scores(energy, ppsp_weight_norm(weight), block.units.channels))
