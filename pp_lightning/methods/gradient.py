"""What static methods that choose by gradients have in common: importances of one kind."""

from abc import abstractmethod
from typing import ClassVar

from pp_lightning.calibration_data import CalibrationData
from pp_lightning.importances import Importances
from pp_lightning.methods.base import PruningMethod, StaticMethod


class GradientMethod(StaticMethod[Importances]):
    """Static: chooses once, from importances."""

    calibration_data: ClassVar[type[CalibrationData]] = Importances
    splits_groups: ClassVar[bool] = False  # gradients of a shared key would count for each of its query heads

    @property
    @abstractmethod
    def kind(self) -> str:
        """:attr:`~pp_lightning.importances.Importances.kind` of those that it chooses from."""


def gradient_method(method: PruningMethod | None) -> GradientMethod | None:
    """What chooses by gradients: this method, or the one whose choice it updates; None for others."""
    origin = getattr(method, "origin", method)
    return origin if isinstance(origin, GradientMethod) else None
