"""The rows of a comparison: what is refused, what each is compared with, and which a killed run has finished."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pp_lightning.app.checks import check_ratio, check_seed
from pp_lightning.app.module import PrunedLM
from pp_lightning.app.results import Comparison, Evaluation
from pp_lightning.app.settings import PruningSettings
from pp_lightning.data.base import EvaluationData
from pp_lightning.data.datamodule import LanguageModelling
from pp_lightning.errors import UserError
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


def finished_rows(out: Path, model: PrunedLM, data: EvaluationData) -> ResumeFile:
    """Rows of a comparison that are evaluated already, kept until all are."""
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
    return ResumeFile(out / _UNFINISHED, settings, _FORMAT)


def key_of(label: str, method: PruningMethod | None, ratio: float, seed: int | None, changes: Mapping[str, Any]) -> str:
    """What tells a row from others; ``seed`` is None where it has no part in the row."""
    settings = None if method is None else method.settings()
    return json.dumps([label, settings, ratio, seed, *([changes] if changes else [])], sort_keys=True, default=str)


def check_seeds(seeds: Sequence[int], model: PrunedLM, rows: Sequence[Row]) -> None:
    """Refuse seeds that are none, or that something in a file would overrule."""
    _check_numbers("seeds", seeds)
    if model.settings.statistics is not None or model.settings.importances is not None:
        raise UserError("seeds draw other calibration windows: leave model.statistics and model.importances out")
    if len(seeds) > 1 and any(row.recovery is not None for row in rows):
        raise UserError("rows with recovery are trained once: compare them with one seed")


def check_comparison(methods: Sequence[str], ratios: Sequence[float], variants: Sequence[object]) -> None:
    """Refuse a comparison of nothing, or of something twice."""
    if not (methods or variants):
        raise UserError("nothing to compare: give at least one of methods (or variants)")
    if len(set(methods)) < len(methods):
        raise UserError(f"methods must be different ones, not {', '.join(methods)}")
    _check_numbers("ratios", ratios)
    if 0.0 in ratios:
        raise UserError("at ratio 0.0 nothing is removed, which is the dense row: leave it out of ratios")


def _check_numbers(name: str, numbers: Sequence[float]) -> None:
    """Refuse seeds or ratios that are none, twice the same, or impossible."""
    if not numbers or len(set(numbers)) < len(numbers):
        raise UserError(f"{name} must be different numbers, at least one, not {list(numbers)}: nothing to compare")
    for number in numbers:
        (check_ratio if name == "ratios" else check_seed)(name, number)
