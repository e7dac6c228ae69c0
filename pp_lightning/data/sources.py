"""Where text comes from: the hub, local files, or the embedded corpus. One class a source."""

import gzip
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pp_lightning.data.embedded import Kind, Part, embedded_documents
from pp_lightning.errors import UserError

T = TypeVar("T")


class TextSource(ABC):
    """Documents of plain text, always the same ones in the same order.

    Attributes:
        path: the local file that it reads, if it reads one.
        file_kind: what that file is, for people.
    """

    path: str | None = None
    file_kind: ClassVar[str] = "text file"

    def check(self) -> None:
        """Refuse a file that is not there, before any work; nothing is read.

        Raises:
            UserError: there is no such file.
        """
        if self.path is not None:
            check_file(self.path, self.file_kind)

    @abstractmethod
    def documents(self) -> Sequence[str]:
        """The documents.

        Raises:
            UserError: the source cannot be read; the message says what to change.
        """

    def text(self) -> str:
        """All documents as one text, joined with a blank line."""
        return "\n\n".join(self.documents())

    def describe(self) -> dict[str, Any]:
        """What a result must carry to be repeated: class, settings, and the SHA-256 of the text."""
        settings = {key: str(value) for key, value in vars(self).items() if value is not None}
        digest = hashlib.sha256(self.text().encode()).hexdigest()
        return {"source": type(self).__name__, **settings, "sha256": digest}


class WikiText2(TextSource):
    """WikiText-2 raw: the hub's data set, or a local ``.raw`` file.

    Args:
        path: a local raw file, one line a row. None loads ``Salesforce/wikitext`` from the hub.
        split: the hub's split; not used for a local file.
    """

    def __init__(self, path: str | None = None, split: str = "test") -> None:
        self.path = path
        self.split = split

    def documents(self) -> Sequence[str]:
        """One document: the split's rows joined with a blank line, as every published perplexity has it."""
        return ["\n\n".join(self._rows())]

    def _rows(self) -> list[str]:
        if self.path is None:
            return _hub_column("text", "Salesforce/wikitext", "wikitext-2-raw-v1", split=self.split)
        lines = _read_text(self.path).splitlines(keepends=True)
        return [line if line.strip() else "" for line in lines]  # the hub stores blank lines as empty rows


class C4(TextSource):
    """C4 English: the start of the hub's first training shard, or local json lines.

    Args:
        path: a local ``.jsonl`` or ``.jsonl.gz`` file, one ``{"text": ...}`` a line (any data set in this form).
            None loads ``allenai/c4`` from the hub.
        percent: how much of the hub's first training shard, from its start; not used for a local file.
    """

    file_kind = "json-lines file (.jsonl or .jsonl.gz)"

    def __init__(self, path: str | None = None, percent: int = 10) -> None:
        if not 1 <= percent <= 100:
            raise UserError(f"percent is how much of C4's first shard to read, 1 to 100, not {percent}")
        self.path = path
        self.percent = percent

    def documents(self) -> Sequence[str]:
        """The documents in file order."""
        if self.path is not None:
            return list(_json_lines(self.path))
        shard = {"train": "en/c4-train.00000-of-01024.json.gz"}
        return _hub_column("text", "allenai/c4", data_files=shard, split=f"train[:{self.percent}%]")


class TextFile(TextSource):
    """Any UTF-8 text file, taken whole as one document.

    Args:
        path: the file.
    """

    path: str

    def __init__(self, path: str) -> None:
        self.path = path

    def documents(self) -> Sequence[str]:
        """One document: the file's text."""
        return [_read_text(self.path)]


class Embedded(TextSource):
    """The Python interpreter's own documentation: needs no network and no file.

    Args:
        part: ``train``, ``calibration`` or ``test``; a fixed hash of the document's name decides.
        kind: ``topic`` for the language reference, ``module`` for docstrings of the standard library, ``all`` for both;
            ``code`` for the library's code without docstrings, a text of another kind.
    """

    def __init__(self, part: Part = "test", kind: Kind = "all") -> None:
        self.part: Part = part
        self.kind: Kind = kind

    def documents(self) -> Sequence[str]:
        """One document a help topic or standard-library module."""
        return embedded_documents(self.part, self.kind)


def check_file(path: str, kind: str) -> None:
    """Refuse a path where no file is.

    Raises:
        UserError: there is none; ``kind`` says what it should be.
    """
    if not Path(path).is_file():
        raise UserError(f"no {kind} at {path}: give the path of an existing file")


def _read_text(path: str) -> str:
    check_file(path, TextSource.file_kind)
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it first") from error


def _json_lines(path: str) -> Iterator[str]:
    check_file(path, C4.file_kind)
    opener = gzip.open if path.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _text_field(path, number, line)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _text_field(path: str, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f'{path}, line {number}: expected one JSON object with a "text" field') from error
    if not isinstance(text, str):
        raise UserError(f'{path}, line {number}: the "text" field must be a string')
    return text


def hub_rows(*args: str, split: str, **kwargs: Any) -> list[dict[str, Any]]:
    """The rows of a data set of the hub; arguments as ``datasets.load_dataset`` takes them.

    Raises:
        UserError: it cannot be loaded.
    """
    return _hub(lambda rows: list(rows), *args, split=split, **kwargs)


def _hub_column(column: str, *args: str, split: str, **kwargs: Any) -> list[str]:
    return _hub(lambda rows: list(rows[column]), *args, split=split, **kwargs)


def _hub(take: Callable[[Any], list[T]], *args: str, split: str, **kwargs: Any) -> list[T]:
    from datasets import load_dataset  # slow to import, and not needed for local files

    try:
        return take(load_dataset(*args, split=split, **kwargs))
    except Exception as error:  # the hub client raises many unrelated types: offline, gated, renamed, ...
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"cannot load {args[0]} from the hub ({reason}): give a local file, as in --data.text.path or "
            "--data.calibration.path"
        ) from error
