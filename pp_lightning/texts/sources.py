"""Where text comes from: the hub, local files, or the embedded corpus. One class a source."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from pp_lightning.errors import UserError
from pp_lightning.files import check_file, read_text
from pp_lightning.texts.embedded import Kind, Part, embedded_documents
from pp_lightning.texts.records import read_records


class TextSource(ABC):
    """Documents of plain text, always the same ones in the same order.

    Attributes:
        path: the local file that it reads, if it reads one.
        file_kind: what that file is, for people.
    """

    path: str | None = None
    file_kind: ClassVar[str] = "text file"

    def check(self) -> None:
        """Refuse a source that is not there, before any work: a file is looked for, a data set of the hub is loaded."""
        if self.path is not None:
            check_file(self.path, self.file_kind)
        else:
            self.documents()

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
        of_hub = ("split",) if getattr(self, "path", None) else ()  # a file is one part, whichever
        settings = {key: str(value) for key, value in vars(self).items() if value is not None and key not in of_hub}
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
            return hub_rows("Salesforce/wikitext", "wikitext-2-raw-v1", split=self.split, column="text")
        lines = read_text(self.path, self.file_kind).splitlines(keepends=True)
        return [line if line.strip() else "" for line in lines]  # the hub stores blank lines as empty rows


class Records(TextSource):
    """Documents from a file of records: ``.jsonl``, ``.jsonl.gz``, ``.parquet`` or ``.arrow``.

    Args:
        path: the file.
        column: the field of a record that holds its text.
    """

    path: str
    file_kind = "file of records (.jsonl, .jsonl.gz, .parquet, .arrow)"

    def __init__(self, path: str, column: str = "text") -> None:
        self.path = path
        self.column = column

    def documents(self) -> Sequence[str]:
        """The documents in file order."""
        return read_records(self.path, self.column, self.file_kind)


class C4(TextSource):
    """C4 English: the start of the hub's first training shard, or a local file of records.

    Args:
        path: a file as :class:`Records` reads it, with a field ``text``. None loads ``allenai/c4`` from the hub.
        percent: how much of the hub's first training shard, from its start; not used for a local file.
    """

    file_kind = Records.file_kind

    def __init__(self, path: str | None = None, percent: int = 10) -> None:
        if not 1 <= percent <= 100:
            raise UserError(f"percent is how much of C4's first shard to read, 1 to 100, not {percent}")
        self.path = path
        self.percent = percent

    def documents(self) -> Sequence[str]:
        """The documents in file order."""
        if self.path is not None:
            return read_records(self.path, "text", self.file_kind)
        shard = {"train": "en/c4-train.00000-of-01024.json.gz"}
        return hub_rows("allenai/c4", data_files=shard, split=f"train[:{self.percent}%]", column="text")


class HubText(TextSource):
    """Any data set of the hub with a column of text.

    Args:
        name: its id, ``org/name``.
        config: which of its configurations, where there are several.
        split: which part.
        column: that holds the text.
    """

    def __init__(self, name: str, config: str | None = None, split: str = "train", column: str = "text") -> None:
        self.name = name
        self.config = config
        self.split = split
        self.column = column

    def documents(self) -> Sequence[str]:
        """One document a row."""
        return hub_rows(self.name, self.config, split=self.split, column=self.column)


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
        return [read_text(self.path, self.file_kind)]


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


def hub_rows(*args: str | None, column: str | None = None, **kwargs: Any) -> list[Any]:
    """The rows of a data set of the hub, or a column of them; arguments as ``datasets.load_dataset`` takes them."""
    from datasets import load_dataset  # slow to import, and not needed for local files

    try:
        rows = load_dataset(*args, **kwargs)
        return list(rows if column is None else rows[column])
    except Exception as error:  # the hub client raises many unrelated types: offline, gated, renamed, ...
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"cannot load {args[0]} from the hub: give a local file, as in --data.text FILE or "
            f"--data.calibration FILE ({reason})"
        ) from error
