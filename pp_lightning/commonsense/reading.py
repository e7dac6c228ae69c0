"""Reading a task's questions from local files in their original formats, or from the hub."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from pp_lightning.commonsense.rows import Question, Row
from pp_lightning.commonsense.tasks import Task
from pp_lightning.errors import UserError
from pp_lightning.files import is_file, read_text


def read_questions(task: Task, path: str | None = None, limit: int | None = None) -> list[Question]:
    """The first ``limit`` questions of a task, or all, in the order of its rows.

    They are in ``path/<task>/<file>``; without a path they are loaded from the hub.

    Raises:
        UserError: there is no such file or data set, or a row cannot be used. The message names file and line. No row
            is ever left out.
    """
    rows = _hub_rows(task) if path is None else _local_rows(task, Path(path) / task.name)
    questions = [task.question(row) for row in rows]
    if not questions:
        raise UserError(f"{task.hub if path is None else Path(path) / task.name / task.file} has no rows")
    return questions[:limit]


def digest(questions: Iterable[Question]) -> str:
    """SHA-256 (hex) over what is scored: contexts, continuations and right answers, in order."""
    text = json.dumps([[q.contexts, q.continuations, q.gold] for q in questions], ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _local_rows(task: Task, folder: Path) -> Iterator[Row]:
    file = folder / task.file
    if task.labels_file is None:
        yield from _json_rows(file)
        return
    labels_file = folder / task.labels_file
    rows, labels = list(_json_rows(file)), list(_lines(labels_file))
    if len(rows) != len(labels):
        shorter, longer = (file, labels_file) if len(rows) < len(labels) else (labels_file, file)
        line = min(len(rows), len(labels)) + 1
        raise UserError(f"{shorter}, line {line}: the file ends here, but {longer} has {max(len(rows), len(labels))}")
    for row, (number, label) in zip(rows, labels, strict=True):
        yield Row({**row.fields, "label": label.strip()}, f"{row.origin} ({labels_file.name}, line {number})")


def _json_rows(file: Path) -> Iterator[Row]:
    for number, line in _lines(file):
        origin = f"{file}, line {number}"
        try:
            fields = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{origin}: not a JSON object") from error
        if not isinstance(fields, dict):
            raise UserError(f"{origin}: not a JSON object")
        yield Row(fields, origin)


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """The file's lines with their numbers. Blank lines may follow the last row, but not stand between rows."""
    if not is_file(file):
        raise UserError(f"no file {file}: give a folder that holds <task>/<file>, or none to load from the hub")
    lines = read_text(file).rstrip().split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise UserError(f"{file}, line {number}: empty line")
        yield number, line


def _hub_rows(task: Task) -> Iterator[Row]:
    from datasets import load_dataset  # slow to import, and not needed for local files

    try:
        rows = load_dataset(task.hub.path, task.hub.name, split=task.hub.split)
    except Exception as error:  # the hub client raises many unrelated types: offline, gated, renamed, ...
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot load {task.hub} from the hub ({reason}): give a local folder with .path") from error
    for number, fields in enumerate(rows, start=1):
        yield Row(fields, f"{task.hub}, row {number}")
