"""The file that lets an interrupted run go on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pp_lightning.errors import UserError
from pp_lightning.files import read_json
from pp_lightning.records import write_json


class ResumeFile:
    """Results of finished parts of a run on disk, with the settings they were obtained under."""

    def __init__(self, path: str | Path | None, settings: Mapping[str, Any], form: str) -> None:
        self._path = None if path is None else Path(path)
        self._form = form
        self._settings = json.loads(json.dumps(settings))  # as it will be read back
        self._results: dict[str, dict[str, Any]] = {}
        if self._path is not None and self._path.exists():
            self._results = self._read(self._path)

    def result_of(self, part: str) -> dict[str, Any] | None:
        """The result of a finished part."""
        return self._results.get(part)

    def add(self, part: str, result: Mapping[str, Any]) -> None:
        """Note a finished part. The file is replaced only when the new one is complete; one process writes it."""
        self._results[part] = dict(result)
        if self._path is None or (torch.distributed.is_initialized() and torch.distributed.get_rank() > 0):
            return
        write_json(self._path, {"format": self._form, "settings": self._settings, "results": self._results})

    def _read(self, path: Path) -> dict[str, dict[str, Any]]:
        try:
            content = read_json(path, "unfinished run")
        except UserError as error:
            raise UserError(f"{error}: remove it or name another file") from error
        if not isinstance(content, dict) or content.get("format") != self._form:
            raise UserError(f"{path} holds no interrupted evaluation of this version: remove it or name another file")
        ours, theirs = self._settings, content["settings"]
        other = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        if other:
            raise UserError(
                f"{path} belongs to another evaluation (other {', '.join(other)}): remove it or name another file"
            )
        results: dict[str, dict[str, Any]] = content["results"]
        return results
