"""Any static choice with weights that take over what went."""

from collections.abc import Iterator, Sequence
from copy import copy
from typing import ClassVar, Self

from torch import Tensor

from pp_lightning.calibration_data import CalibrationData
from pp_lightning.methods.base import BlockToPrune, StaticChoice, StaticMethod


class Updated(StaticMethod[CalibrationData]):
    """Static: another method's choice, whose kept weights then take over what the removed ones did.

    Args:
        origin: the method that chooses.
    """

    updates: ClassVar[bool] = True

    def __init__(self, origin: StaticMethod) -> None:
        super().__init__([block.value for block in origin.blocks], origin.attention_unit)  # type: ignore[arg-type]
        self.origin = origin
        self.label = f"{origin.label}_updated"  # type: ignore[misc]
        self.calibration_data = origin.calibration_data  # type: ignore[misc]
        self.needs_statistics = origin.needs_statistics  # type: ignore[misc]
        self.splits_groups = origin.splits_groups  # type: ignore[misc]
        self.allocation = origin.allocation

    @property
    def needs_means(self) -> bool:
        """As the origin does."""
        return self.origin.needs_means

    @property
    def restores_means(self) -> bool:
        """As the origin does: the update then has a bias."""
        return self.origin.restores_means

    @property
    def allocates(self) -> bool:
        """As the origin does."""
        return self.origin.allocates

    def with_uniform_counts(self) -> Self:
        """The origin with the same counts in every pruned layer."""
        method = copy(self)
        method.origin = self.origin.with_uniform_counts()
        method.allocation = method.origin.allocation
        return method

    def settings(self) -> dict[str, object]:
        """The origin's."""
        return {**self.origin.settings(), "update": "least_squares"}

    def choose(
        self, blocks: Sequence[BlockToPrune], calibration_data: CalibrationData
    ) -> Iterator[tuple[BlockToPrune, StaticChoice]]:
        """The origin's choice."""
        return self.origin.choose(blocks, calibration_data)

    def unit_scores(self, block: BlockToPrune, calibration_data: CalibrationData) -> Tensor:
        """The origin's scores (U,) float32."""
        return self.origin.unit_scores(block, calibration_data)
