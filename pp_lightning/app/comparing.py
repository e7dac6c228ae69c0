"""The rows of a comparison, and what each of them is compared with."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

from pp_lightning.app.module import PrunedLM
from pp_lightning.app.prunable import PruningSettings
from pp_lightning.app.results import Comparison, Evaluation
from pp_lightning.data.base import EvaluationData
from pp_lightning.data.datamodule import LanguageModelling
from pp_lightning.methods import DynamicMethod, LoRAPrune, PruningMethod
from pp_lightning.recovery import Recovery


@dataclass(frozen=True)
class Row:
    """One row of a comparison still to be evaluated: a method, at a ratio, with or without recovery.

    Attributes:
        label: its name.
        method: with its settings; None is the dense model.
        pruning_ratio: fraction removed.
        recovery: how it is trained, where it is.
        model: settings of the module that are the row's own: ``allocation``, ``skip_layers``, ``refresh``.
        data: settings of the data that it is measured on: ``prefix``, ``batch_size``, ``distances``.
    """

    label: str
    method: PruningMethod | None = None
    pruning_ratio: float = 0.0
    recovery: Recovery | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)

    def settings(self, module: PrunedLM) -> PruningSettings:
        """The module's settings as this row has them."""
        return replace(module.settings, pruning_ratio=self.pruning_ratio, **self.model)

    def seeded(self, seed: int) -> "Row":
        """The same, with probes drawn by another seed."""
        if not isinstance(self.method, DynamicMethod):
            return self
        method = copy(self.method)
        method.seed = seed
        return replace(self, method=method)

    @property
    def chooses_while_trained(self) -> bool:
        """Whether no calibration data is collected before training."""
        return self.recovery is not None and isinstance(self.method, LoRAPrune)


def side_by_side(rows: Sequence[Row], means: Sequence[Evaluation]) -> list[Comparison]:
    """Every row beside the dense model on the same data, and beside the first pruned row at its ratio."""
    dense = {repr(row.data): mean for row, mean in zip(rows, means, strict=True) if row.method is None}
    first: dict[float, tuple[Row, Evaluation]] = {}
    found = []
    for row, mean in zip(rows, means, strict=True):
        other, reference = first.setdefault(row.pruning_ratio, (row, mean))
        paired = row.method is not None and row is not other and row.data == other.data
        found.append(Comparison.of(mean, dense[repr(row.data)], reference if paired else None))
    return found


def draws(row: Row, model: PrunedLM, data: EvaluationData) -> bool:
    """Whether a seed has a part in a row: in the order of its batches, or in what its method calibrates on."""
    if not isinstance(data, LanguageModelling) or data.protocol != "contiguous":
        return True
    return row.method is not None and ("allocation" in row.model or model.reads_calibration(model.settled(row.method)))


@contextmanager
def changed(target: object, values: Mapping[str, Any]) -> Iterator[None]:
    """Other settings for a while."""
    before = {name: getattr(target, name) for name in values}
    try:
        for name, value in values.items():
            setattr(target, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)
