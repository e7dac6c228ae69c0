"""What a run that was killed goes on from: finished rows, and the settings that they depend on."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pp_lightning.app.module import PrunedLM
from pp_lightning.app.results import Evaluation
from pp_lightning.data.base import EvaluationData
from pp_lightning.methods import PruningMethod
from pp_lightning.records import environment
from pp_lightning.resume import ResumeFile
from pp_lightning.statistics import fingerprint

_FORMAT = "pp-lightning comparison 1"
_UNFINISHED = "unfinished-compare.json"


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
