"""What static methods that choose by gradients have in common: importances of one kind."""

from abc import abstractmethod
from typing import ClassVar

from pp_lightning.evidence import Evidence
from pp_lightning.importances import Importances
from pp_lightning.methods.base import StaticMethod


class GradientMethod(StaticMethod[Importances]):
    """Static: chooses once, from importances."""

    evidence: ClassVar[type[Evidence]] = Importances
    splits_groups: ClassVar[bool] = False  # gradients of a shared key would count for each of its query heads

    @property
    @abstractmethod
    def kind(self) -> str:
        """:attr:`~pp_lightning.importances.Importances.kind` of those that it chooses from."""
