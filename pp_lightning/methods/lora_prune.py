"""LoRAPrune: importance from the gradients of low-rank adapters alone (arXiv 2305.18403)."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from pp_lightning.errors import UserError
from pp_lightning.functional.members import normalised_unit_scores
from pp_lightning.importances import Importances
from pp_lightning.methods.base import BOTH_BLOCKS, BlockName, BlockToPrune, UnitName
from pp_lightning.methods.gradient import GradientMethod

LORA = "lora"  # the kind of importances that it chooses from


class LoRAPrune(GradientMethod):
    """Static: a unit scores ``|g (W + c B A)|``, g from its adapters' gradients, each matrix brought to unit length.

    Without recovery it chooses once, from the first gradient of fresh adapters, a random projection of the true one.
    With recovery (``--model.recovery``) it removes units while the adapters train, in steps of a cubic schedule and by
    a moving average of the scores.

    Args:
        samples: calibration windows for the one choice without recovery.
        window: tokens of each, no more than the data's own window.
        rank: of the adapters for the one choice without recovery.
        momentum: m of the moving average ``S = m S + (1 - m) S_new``.
        warmup: fraction of the training steps before the first unit goes.
        cooldown: fraction of the training steps after the last unit has gone.
        every: training steps between two removals.
        blocks: which blocks are pruned, ``attention``, ``mlp`` or both.
        attention_unit: ``query_head`` or ``kv_group``; None takes groups where query heads share key/value heads.
    """

    label: ClassVar[str] = "lora_prune"

    def __init__(
        self,
        samples: int = 10,
        window: int = 512,
        rank: int = 8,
        momentum: float = 0.9,
        warmup: float = 0.1,
        cooldown: float = 0.1,
        every: int = 10,
        blocks: Sequence[BlockName] = BOTH_BLOCKS,
        attention_unit: UnitName | None = None,
    ) -> None:
        super().__init__(blocks, attention_unit)
        if samples < 1 or window < 2 or rank < 1 or every < 1:
            raise UserError("samples, rank and every must be at least 1 and window at least 2")
        if not 0.0 <= momentum < 1.0 or min(warmup, cooldown) < 0.0 or warmup + cooldown >= 1.0:
            raise UserError("momentum must be in [0, 1), warmup and cooldown fractions that leave steps in between")
        self.samples = samples
        self.window = window
        self.rank = rank
        self.momentum = momentum
        self.warmup = warmup
        self.cooldown = cooldown
        self.every = every

    @property
    def kind(self) -> str:
        """By the gradients of adapters."""
        return LORA

    def unit_scores(self, block: BlockToPrune, calibration_data: Importances) -> Tensor:
        """Scores (U,) float32 of a block's units."""
        members = [vector.to(block.weight.device) for vector in calibration_data.of(block.key, self.kind)]
        return block.informative(normalised_unit_scores(members, block.units.number))
