"""Questions about the method, each answered by rows that differ in one thing; ``assets/studies.yaml`` has them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from pp_lightning.app.comparing import Row
from pp_lightning.data.base import EvaluationData
from pp_lightning.data.datamodule import LanguageModelling
from pp_lightning.errors import UserError, unknown
from pp_lightning.methods import method_named

_OF_MODEL = {"allocation", "skip_layers", "refresh"}
_OF_DATA = {"prefix", "batch_size", "distances"}


@dataclass(frozen=True)
class Study:
    """A question and the rows that answer it.

    Attributes:
        rows: at any ratio. The first is the one that the others are compared with.
        continues: whether it is about what follows a prompt: for protocol ``continuation`` only.
        overlap: whether each layer's kept units are compared with those of Full-Batch Probing too.
    """

    title: str
    rows: Sequence[Row]
    continues: bool = False
    overlap: bool = False

    def fitting(self, data: EvaluationData) -> list[Row]:
        """The rows without those whose prompt leaves nothing of a window to score.

        Raises:
            UserError: the data is not a text in fixed windows, or the question is about what follows a prompt, and the
                protocol has none.
        """
        if not isinstance(data, LanguageModelling) or data.protocol == "paper":
            raise UserError("a study compares perplexities on the same batches: use --data text, protocol contiguous")
        if self.continues and data.protocol != "continuation":
            raise UserError("studies of what follows a prompt need --data.protocol continuation")
        return [
            one
            for one in self.rows
            if one.data.get("prefix", data.prefix) + one.data.get("distances", (0,))[0] < data.window
        ]


def study_named(name: str) -> Study:
    """A study by its name."""
    if name not in study_names():
        raise unknown("study", name, study_names())
    written = dict(_written()[name])
    rows = [_row(label, *row) for label, row in written.pop("rows").items()]
    for setting, values in written.pop("over", {}).items():
        rows = [
            replace(row, label=f"{row.label}, {setting} {value}", data={**row.data, setting: value})
            for row in rows
            for value in values
        ]
    return Study(rows=rows, **written)


def study_names() -> list[str]:
    """The names that :func:`study_named` knows."""
    return list(_written())


@lru_cache(maxsize=1)
def _written() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(
        (Path(__file__).parents[1] / "assets" / "studies.yaml").read_text(encoding="utf-8")
    )
    return found


def _row(label: str, method_label: str, changes: Mapping[str, Any] | None = None) -> Row:
    method, changes = method_named(method_label), dict(changes or {})
    model, data = ({name: changes.pop(name) for name in names & changes.keys()} for names in (_OF_MODEL, _OF_DATA))
    settings: dict[str, Any] = {**method.settings(), **changes}
    return Row(label, type(method)(**settings) if changes else method, model=model, data=data)
