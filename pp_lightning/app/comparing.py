"""The rows of a comparison: what each of them is compared with, and which a run that was killed has finished."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pp_lightning.app.module import PrunedLM
from pp_lightning.app.prunable import PruningSettings
from pp_lightning.app.results import Comparison, Evaluation
from pp_lightning.data.base import EvaluationData
from pp_lightning.data.datamodule import LanguageModelling
from pp_lightning.methods import DynamicMethod, LoRAPrune, PruningMethod
from pp_lightning.records import environment
from pp_lightning.recovery import Recovery
from pp_lightning.resume import ResumeFile
from pp_lightning.statistics import fingerprint

_FORMAT = "pp-lightning comparison 1"
_UNFINISHED = "unfinished-compare.json"


@dataclass(frozen=True)
class Row:
    """One row of a comparison still to be evaluated: a method, none for the dense model, at a ratio.

    Attributes:
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


class FinishedRows:
    """Rows of a comparison that are evaluated already, kept until all are."""

    def __init__(self, out: Path, model: PrunedLM, data: EvaluationData) -> None:
        settings = {
            "model": fingerprint(model.model),
            **asdict(replace(model.settings, pruning_ratio=0.0, importances=None)),  # rows have their own ratios
            **{name: value for name, value in data.describe().items() if name != "seed"},
            "precision": model.trainer.precision,
            "compiled": model.compiles,
            "versions": environment(model.device, 1)["versions"],
            "calibrated": {
                "samples": data.calibration_samples,
                **{name: str(value) for name, value in vars(data.calibration).items()},
            },
        }
        self._file = ResumeFile(out / _UNFINISHED, settings, _FORMAT)

    def __getitem__(self, key: str) -> Evaluation | None:
        """The row of this key; None where it is not finished."""
        found = self._file.result_of(key)
        return None if found is None else Evaluation.from_dict(found)

    def __setitem__(self, key: str, row: Evaluation) -> None:
        """Keep a finished row."""
        self._file.add(key, asdict(row))


def key_of(label: str, method: PruningMethod | None, ratio: float, seed: int | None, changes: Mapping[str, Any]) -> str:
    """What tells a row from others; ``seed`` is None where it has no part in the row."""
    settings = None if method is None else method.settings()
    return json.dumps([label, settings, ratio, seed, *([changes] if changes else [])], sort_keys=True, default=str)
