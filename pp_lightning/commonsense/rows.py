"""One row of a data set, read field by field: whatever is wrong with it is an error that says where it stands."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pp_lightning.errors import UserError


@dataclass(frozen=True)
class Question:
    """One multiple-choice question as the model sees it.

    Attributes:
        contexts: what each choice is conditioned on; the same text for all choices except in WinoGrande.
        continuations: what is scored after each context: the delimiter, one space, and the choice's text.
        origin: where the question comes from, ``file, line number``, for messages.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int
    origin: str

    @property
    def characters(self) -> tuple[int, ...]:
        """Characters of each choice without the delimiter: what ``acc_norm`` divides by."""
        return tuple(len(text) - 1 for text in self.continuations)


@dataclass(frozen=True)
class Row:
    """A row's fields and its origin."""

    fields: Mapping[str, Any]
    origin: str

    def error(self, reason: str) -> UserError:
        """The error to raise for this row."""
        return UserError(f"{self.origin}: {reason}")

    def text(self, name: str, *, may_be_empty: bool = False) -> str:
        """A field that must be text."""
        value = self.fields.get(name)
        if not isinstance(value, str):
            raise self.error(f"expected text in the field {name!r}")
        return value if may_be_empty else self.filled(value, name)

    def filled(self, text: str, what: str) -> str:
        """``text``, which must not be empty."""
        if not text.strip():
            raise self.error(f"the {what} is empty")
        return text

    def answer(self, *names: str) -> Any:
        """The first of these fields that is there and filled."""
        for name in names:
            value = self.fields.get(name)
            if value is not None and value != "":
                return value
        raise self.error(f"the row has no answer (field {' or '.join(map(repr, names))})")

    def question(self, context: str | Sequence[str], choices: Sequence[str], gold: int) -> Question:
        """A question of this row."""
        contexts = [context] * len(choices) if isinstance(context, str) else list(context)
        if not 0 <= gold < len(choices):
            raise self.error(f"the label {gold} is outside the {len(choices)} choices")
        for text in contexts:
            self.filled(text, "context")
        for number, text in enumerate(choices, start=1):
            self.filled(text, f"choice {number}")
        return Question(tuple(contexts), tuple(f" {text}" for text in choices), gold, self.origin)


def as_index(row: Row, value: Any) -> int:
    """A label that is stored as a number or as text."""
    if isinstance(value, str) and value.strip().lstrip("-").isdecimal():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise row.error(f"the label {value!r} is not a number")
