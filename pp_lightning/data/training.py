"""What a model is trained on: rows of one length or another, cut from texts or made of instructions."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from pp_lightning.data.order import Row
from pp_lightning.data.windows import IGNORED_LABEL, shuffled
from pp_lightning.errors import UserError
from pp_lightning.files import check_file, read_text, reading
from pp_lightning.texts.sources import C4, TextSource, hub_rows

Encode = Callable[[str], list[int]]


class TrainingRows(ABC):
    """Rows to train on, cut from ``sources`` if they are; a size that is None is the data's.

    ``held_out`` rows are kept from training, for the held-out loss; 0 takes the data's ``text`` for it.
    """

    sources: Sequence[TextSource] = ()

    def __init__(self, window: int | None, batch_size: int | None, held_out: int = 0) -> None:
        if held_out < 0 or (window is not None and window < 2) or (batch_size is not None and batch_size < 1):
            raise UserError("rows to train on need a window of at least 2, a batch_size of at least 1, held_out from 0")
        self.window = window
        self.batch_size = batch_size
        self.held_out = held_out

    def check(self) -> None:
        """Refuse files that are not there, before any work; nothing is read."""
        for source in self.sources:
            source.check()

    @abstractmethod
    def rows(self, encode: Encode, window: int, end: int | None) -> list[Row]:
        """All rows, the ``held_out`` ones first, always in the same order.

        Raises:
            UserError: there are too few, or one cannot be used.
        """


class Packed(TrainingRows):
    """Texts end to end, cut into full windows; each document is closed by the end-of-text token.

    Args:
        sources: the texts; naming one twice doubles its weight.
        window: tokens a row; none takes the data's window.
        batch_size: rows a batch of one process; none takes the data's batch size.
    """

    def __init__(self, sources: list[TextSource], window: int | None = None, batch_size: int | None = None) -> None:
        super().__init__(window, batch_size)
        self.sources = sources

    def rows(self, encode: Encode, window: int, end: int | None) -> list[Row]:
        """Windows over all texts."""
        ids: list[int] = []
        for source in self.sources:
            for document in source.documents():
                ids += [*encode(document), *([] if end is None else [end])]
        return [(piece, piece) for piece in torch.tensor(ids).split(window) if len(piece) == window]


class FirstWindows(TrainingRows):
    """The first window of each document that is longer, all tokens predicted: the published recovery data with C4.

    Args:
        source: the documents; none takes C4.
        documents: how many to use, in a seeded random order, held-out ones included; none takes all long enough.
        held_out: of these, how many are kept for the held-out loss.
        window: tokens a row; none takes the data's window.
        batch_size: rows a batch of one process; none takes the data's batch size.
        seed: of the order.
    """

    def __init__(
        self,
        source: TextSource | None = None,
        documents: int | None = None,
        held_out: int = 0,
        window: int | None = None,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(window, batch_size, held_out)
        self.sources = [source or C4()]
        self.documents = documents
        self.seed = seed

    def rows(self, encode: Encode, window: int, end: int | None) -> list[Row]:
        """One row a document."""
        rows: list[Row] = []
        for document in shuffled(self.sources[0].documents(), self.seed):
            ids = encode(document)
            if len(ids) > window:
                row = torch.tensor(ids[:window])
                rows.append((row, row))
                if len(rows) == self.documents:
                    return rows
        if self.documents is not None:
            raise UserError(
                f"{len(rows)} documents have more than {window} tokens and {self.documents} are asked for: "
                "lower documents or the window of the training rows"
            )
        return rows


class Instructions(TrainingRows):
    """Instructions and their answers; only the answer is predicted. Long answers are cut at the window.

    Args:
        path: a local ``.json`` or ``.jsonl`` file of objects with ``instruction``, ``output`` and optionally ``input``.
            None loads ``yahma/alpaca-cleaned`` from the hub.
        held_out: rows kept for the held-out loss, chosen by ``seed``.
        window: tokens a row at most; none takes the data's window.
        batch_size: rows a batch of one process; none takes the data's batch size.
        seed: of the order.
    """

    def __init__(
        self,
        path: str | None = None,
        held_out: int = 0,
        window: int | None = None,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(window, batch_size, held_out)
        self.path = path
        self.seed = seed

    def check(self) -> None:
        """Refuse a file that is not there."""
        if self.path is not None:
            check_file(self.path, "file of instructions (.json or .jsonl)")

    def rows(self, encode: Encode, window: int, end: int | None) -> list[Row]:
        """One row an instruction."""
        given = shuffled(list(enumerate(self._read(), start=1)), self.seed)
        return [self._row(number, fields, encode, window, end) for number, fields in given]

    def _row(self, number: int, fields: Mapping[str, Any], encode: Encode, window: int, end: int | None) -> Row:
        prompt = _prompt(fields)
        asked, whole = encode(prompt), encode(prompt + fields["output"]) + ([] if end is None else [end])
        if len(asked) >= window:
            raise UserError(
                f"instruction {number} of {self.path or 'the hub'} has {len(asked)} tokens before its answer: "
                f"leave it out or raise the window of {window}"
            )
        ids = torch.tensor(whole[:window])
        labels = ids.clone()
        labels[: len(asked)] = IGNORED_LABEL
        return ids, labels

    def _read(self) -> Sequence[Mapping[str, Any]]:
        self.check()
        given = hub_rows("yahma/alpaca-cleaned", split="train") if self.path is None else _json_objects(self.path)
        for number, fields in enumerate(given, start=1):
            if not all(isinstance(fields.get(name), str) for name in ("instruction", "output")):
                raise UserError(f"instruction {number} of {self.path} lacks the text of its instruction or output")
        return given


def _prompt(fields: Mapping[str, Any]) -> str:
    """Everything before the answer: Alpaca's headings, which instruction data is published with."""
    context = fields.get("input") or ""
    parts = [f"### Instruction:\n{fields['instruction']}", *([f"### Input:\n{context}"] if context else [])]
    return "\n\n".join([*parts, "### Response:\n"])


def _json_objects(path: str) -> list[Mapping[str, Any]]:
    text = read_text(path, "file of instructions (.json or .jsonl)")
    with reading(path):
        found = json.loads(text) if path.endswith(".json") else [json.loads(line) for line in text.splitlines() if line]
    if not isinstance(found, list) or not all(isinstance(fields, dict) for fields in found):
        raise UserError(f"{path} does not hold objects with an instruction and an output")
    return found
