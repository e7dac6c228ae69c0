"""A dynamic method's choice made once and kept: from the calibration history, or as it was for one text."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from pp_lightning.blocks import BlockKey
from pp_lightning.errors import UserError
from pp_lightning.methods.base import BlockToPrune, StaticMethod
from pp_lightning.methods.dynamic import DynamicMethod
from pp_lightning.statistics import Statistics


class FrozenMethod(StaticMethod):
    """Static: what a dynamic method chose, for good. Made by the functions below, not by hand.

    Raises:
        UserError: the method also puts back a mean for every batch.
    """

    frozen_on: ClassVar[str]

    def __init__(self, origin: DynamicMethod) -> None:
        if origin.restores_means:
            raise UserError("compensation is computed for every batch and cannot be frozen: leave it out")
        super().__init__([block.value for block in origin.blocks], origin.attention_unit)  # type: ignore[arg-type]
        self.origin = origin
        self.allocation = origin.allocation
        self.label = f"{origin.label}_frozen"  # type: ignore[misc]

    def settings(self) -> dict[str, object]:
        """The dynamic method's, and what its choice was frozen on."""
        return {**self.origin.settings(), "frozen_on": self.frozen_on}


class FrozenOnHistory(FrozenMethod):
    """The choice that a method with a history makes of the calibration history alone, without a probe.

    For Probe Pruning this is static PPsp.

    Raises:
        UserError: the method keeps no history, or its scores need more than one.
    """

    frozen_on: ClassVar[str] = "history"

    def __init__(self, origin: DynamicMethod) -> None:
        if not origin.keeps_history:
            raise UserError(f"{type(origin).__name__} keeps no history to freeze its choice on: freeze it on a text")
        if origin.centres:
            raise UserError("scores about the mean need a probe, which a history has not: freeze the choice on a text")
        super().__init__(origin)

    def unit_scores(self, block: BlockToPrune, statistics: Statistics) -> Tensor:
        """The dynamic method's scores (U,) float32 of the history's energy."""
        energy = statistics.energy(*block.key).to(block.weight.device)
        return block.checked(
            self.origin.unit_scores(energy, self.origin.weight_norm(block.weight), block.units.channels)
        )


class FrozenOnText(FrozenMethod):
    """The choice that a method made for one batch of text.

    Args:
        origin: the dynamic method.
        kept: the units that it kept, (K,) int64 ascending, of every block.
    """

    frozen_on: ClassVar[str] = "text"
    needs_statistics: ClassVar[bool] = False

    def __init__(self, origin: DynamicMethod, kept: Mapping[BlockKey, Tensor]) -> None:
        super().__init__(origin)
        self.kept = kept

    def unit_scores(self, block: BlockToPrune, statistics: Statistics) -> Tensor:
        """One for the units that were kept, zero for the others: (U,) float32."""
        kept = self.kept.get(block.key)
        if kept is None or len(kept) != block.plan.keep:
            raise UserError(
                f"the frozen choice does not fit layer {block.layer}: prune with the ratios it was made with"
            )
        return (
            torch.zeros(block.units.number, dtype=torch.float32).index_fill(0, kept.cpu(), 1.0).to(block.weight.device)
        )
