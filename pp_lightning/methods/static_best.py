"""What came out best of static choices; ours, not the paper's (docs/beyond.md, "Weights that take over")."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from pp_lightning.methods.base import BOTH_BLOCKS, AllocationName, BlockName, BlockToPrune, StaticMethod, UnitName
from pp_lightning.methods.static_ppsp import StaticPPsp
from pp_lightning.statistics import Statistics


class StaticBest(StaticMethod[Statistics]):
    """Static: PPsp's scores, and kept weights that take over what the removed ones did.

    Units are spread over the layers by one ranking of what each adds to its block's error after that update, relative
    to the residual (:func:`~pp_lightning.measured.ranked_after_update`), in the measure of what pruning the block alone
    does to the loss on tokens held out (:func:`~pp_lightning.sensitivity.loss_rises`).

    Args:
        allocation: how the removed units are spread over the layers.
        bias: fit deviations from the mean and put what is left of the mean into a bias.
        blocks: which blocks are pruned, ``attention``, ``mlp`` or both.
        attention_unit: ``query_head`` or ``kv_group``; None takes groups where query heads share key/value heads.
    """

    label: ClassVar[str] = "static_best"
    updates: ClassVar[bool] = True

    def __init__(
        self,
        allocation: AllocationName = "global",
        bias: bool = False,
        blocks: Sequence[BlockName] = BOTH_BLOCKS,
        attention_unit: UnitName | None = None,
    ) -> None:
        super().__init__(blocks, attention_unit)
        self.allocation = allocation
        self.bias = bias

    @property
    def restores_means(self) -> bool:
        """The bias does."""
        return self.bias

    @property
    def needs_means(self) -> bool:
        """A ranking over layers looks at deviations from what is restored."""
        return self.bias

    def unit_scores(self, block: BlockToPrune, calibration_data: Statistics) -> Tensor:
        """Static PPsp's scores (U,) float32 of a block's units."""
        return StaticPPsp().unit_scores(block, calibration_data)
