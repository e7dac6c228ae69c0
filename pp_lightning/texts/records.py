"""Files of records with a field of text: json lines, plain or compressed, Parquet and Arrow."""

import gzip
import json
from collections.abc import Iterator
from typing import Any

from pp_lightning.errors import UserError
from pp_lightning.files import check_file, checked_text, reading


def read_records(path: str, column: str, kind: str) -> list[str]:
    """The texts in file order."""
    check_file(path, kind)
    is_table = path.lower().endswith((".parquet", ".arrow"))
    found, unit = (_column(path, column), "row") if is_table else (_json_lines(path, column), "line")
    with reading(path):
        return [checked_text(text, f"{path}, {unit} {number}") for number, text in found]


def _json_lines(path: str, column: str) -> Iterator[tuple[int, Any]]:
    opener = gzip.open if path.lower().endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield number, json.loads(line)[column]
                except (json.JSONDecodeError, KeyError, TypeError, RecursionError) as error:
                    raise UserError(
                        f'{path}, line {number}: expected one JSON object with a "{column}" field'
                    ) from error


def _column(path: str, column: str) -> Iterator[tuple[int, Any]]:
    import pyarrow  # comes with datasets; slow to import
    import pyarrow.parquet

    try:
        parquet = path.lower().endswith(".parquet")
        table = pyarrow.parquet.read_table(path) if parquet else _arrow_table(pyarrow, path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"cannot read {path}: it is damaged, or of another kind than its name says") from error
    if column not in table.column_names:
        raise UserError(f'{path} has no column "{column}": it has {", ".join(table.column_names)}')
    yield from enumerate(table[column].to_pylist(), start=1)


def _arrow_table(pyarrow: Any, path: str) -> Any:
    """A table of the form that ``datasets`` saves (a stream), or of Arrow's own files."""
    with pyarrow.memory_map(path) as source:
        try:
            return pyarrow.ipc.open_stream(source).read_all()
        except pyarrow.ArrowInvalid:
            return pyarrow.ipc.open_file(source).read_all()
