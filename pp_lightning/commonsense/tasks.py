"""The seven tasks as data: where their rows are and how a row becomes a question.

Texts are those of EleutherAI's lm-evaluation-harness 0.4.13 (``lm_eval/tasks``), whose numbers people compare; the
delimiter between context and choice is one space. A parser takes a row of the original files or of the hub.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from pp_lightning.commonsense.rows import Question, Row, as_index
from pp_lightning.errors import UserError


@dataclass(frozen=True)
class HubSplit:
    """A split of a hub data set; the ones that lm-evaluation-harness takes."""

    path: str
    name: str | None
    split: str

    def __str__(self) -> str:
        return " ".join(part for part in (self.path, self.name, self.split) if part)


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: the harness's name of it, also the folder of its local files.
        file: the local file of rows, one JSON object a line.
        signature: fields that tell its rows from those of other tasks.
        labels_file: a second local file, with one label a line, where the original keeps labels apart.
    """

    name: str
    hub: HubSplit
    file: str
    signature: frozenset[str]
    parse: Callable[[Row], Question]
    labels_file: str | None = None

    def question(self, row: Row) -> Question:
        """The question in a row."""
        missing = sorted(self.signature - row.fields.keys())
        if missing:
            raise row.error(f"no field {missing[0]!r}, so this is no row of {self.name}{_belongs_to(row.fields)}")
        return self.parse(row)


def _boolq(row: Row) -> Question:
    value = row.answer("answer", "label")
    gold = int(value) if isinstance(value, bool) else as_index(row, value)
    return row.question(f"{row.text('passage')}\nQuestion: {row.text('question')}?\nAnswer:", ("no", "yes"), gold)


def _piqa(row: Row) -> Question:
    gold = as_index(row, row.answer("label"))
    choices = (row.text("sol1"), row.text("sol2"))
    return row.question(f"Question: {row.text('goal')}\nAnswer:", choices, gold)


def _hellaswag(row: Row) -> Question:
    beginning, rest = row.text("ctx_a", may_be_empty=True), row.text("ctx_b", may_be_empty=True)
    row.filled(beginning + rest, "context")
    endings = row.fields["endings"]
    if not isinstance(endings, list) or len(endings) < 2 or not all(isinstance(text, str) for text in endings):
        raise row.error("expected a list of texts in the field 'endings'")
    context = f"{row.text('activity_label')}: {beginning} {rest.capitalize()}"
    gold = as_index(row, row.answer("label"))
    return row.question(_without_artefacts(context), [_without_artefacts(text) for text in endings], gold)


def _without_artefacts(text: str) -> str:
    """WikiHow's markup removed, in the harness's order: one pass each, so three spaces leave two."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _winogrande(row: Row) -> Question:
    """Partial scoring: the option belongs to the context, and what follows the blank is scored."""
    before, blank, after = row.text("sentence").partition("_")
    if not blank:
        raise row.error("the sentence has no blank '_'")
    contexts = [before + row.text(option) for option in ("option1", "option2")]
    gold = as_index(row, row.answer("answer")) - 1
    if gold not in (0, 1):
        raise row.error(f"the label {gold + 1} is outside the choices 1 and 2")
    return row.question(contexts, [after.strip()] * 2, gold)


_OPENBOOKQA_ID = re.compile(r"\d+(-\d+)?")


def _arc(row: Row) -> Question:
    if _OPENBOOKQA_ID.fullmatch(str(row.fields.get("id", ""))):
        raise row.error(f"the id {row.fields['id']!r} is one of openbookqa, not of ARC")
    stem, choices, gold = _stem_and_choices(row, "question")
    return row.question(f"Question: {stem}\nAnswer:", choices, gold)


def _openbookqa(row: Row) -> Question:
    if not _OPENBOOKQA_ID.fullmatch(str(row.fields.get("id", "0"))):
        raise row.error(f"the id {row.fields['id']!r} is not one of openbookqa; is this a file of ARC?")
    return row.question(*_stem_and_choices(row, "question_stem"))


def _stem_and_choices(row: Row, hub_stem: str) -> tuple[str, list[str], int]:
    """The stem, the choices' texts and the right one's index, from either of the two formats.

    The original files nest them, ``question: {stem, choices: [{text, label}]}``; the hub has the stem in a field of
    its own and ``choices: {text: [...], label: [...]}``.
    """
    nested = row.fields.get("question")
    original = isinstance(nested, Mapping)
    inner = Row(nested, row.origin) if isinstance(nested, Mapping) else row
    stem = inner.text("stem" if original else hub_stem)
    texts, labels = _choice_columns(inner)
    if not 3 <= len(texts) <= 5:
        raise row.error(f"{len(texts)} choices; questions of this task have 3 to 5")
    if len(set(labels)) < len(labels) or not (set(labels) <= set("ABCDE") or set(labels) <= set("12345")):
        raise row.error(f"the choices' labels {labels} are not different ones of A to E or 1 to 5")
    key = str(row.answer("answerKey")).strip()
    if key not in labels:
        raise row.error(f"the answer {key!r} is outside the choices {', '.join(labels)}")
    return stem, texts, labels.index(key)


def _choice_columns(row: Row) -> tuple[list[str], list[str]]:
    choices = row.fields.get("choices")
    try:
        if isinstance(choices, Mapping):
            columns: Iterable[tuple[Any, Any]] = zip(choices["text"], choices["label"], strict=True)
        else:
            columns = [(choice["text"], choice["label"]) for choice in choices or ()]
        pairs = list(columns)
    except (KeyError, TypeError, ValueError) as error:
        raise row.error("every choice needs a text and a label") from error
    if not all(isinstance(value, str) for pair in pairs for value in pair):
        raise row.error("a choice's text and label must be text")
    return [text for text, _ in pairs], [label for _, label in pairs]


_ARC = partial(Task, file="test.jsonl", signature=frozenset({"id", "question"}), parse=_arc)

TASKS: tuple[Task, ...] = (
    Task(
        "boolq",
        HubSplit("aps/super_glue", "boolq", "validation"),
        "validation.jsonl",
        frozenset({"passage", "question"}),
        _boolq,
    ),
    Task(
        "piqa",
        HubSplit("baber/piqa", None, "validation"),
        "valid.jsonl",
        frozenset({"goal", "sol1", "sol2"}),
        _piqa,
        labels_file="valid-labels.lst",
    ),
    Task(
        "hellaswag",
        HubSplit("Rowan/hellaswag", None, "validation"),
        "validation.jsonl",
        frozenset({"activity_label", "ctx_a", "ctx_b", "endings"}),
        _hellaswag,
    ),
    Task(
        "winogrande",
        HubSplit("allenai/winogrande", "winogrande_xl", "validation"),
        "validation.jsonl",
        frozenset({"sentence", "option1", "option2"}),
        _winogrande,
    ),
    _ARC("arc_easy", HubSplit("allenai/ai2_arc", "ARC-Easy", "test")),
    _ARC("arc_challenge", HubSplit("allenai/ai2_arc", "ARC-Challenge", "test")),
    Task("openbookqa", HubSplit("allenai/openbookqa", "main", "test"), "test.jsonl", frozenset({"id"}), _openbookqa),
)
TASK_NAMES = tuple(task.name for task in TASKS)


def task_named(name: str) -> Task:
    """The task of this name."""
    for task in TASKS:
        if task.name == name:
            return task
    raise UserError(f"there is no task {name!r}: choose from {', '.join(TASK_NAMES)}")


def _belongs_to(fields: Mapping[str, Any]) -> str:
    """A hint for the message, where the fields fit exactly one kind of task better."""
    fitting = [task for task in TASKS if task.signature <= fields.keys()]
    best = max(fitting, key=lambda task: len(task.signature), default=None)
    return "" if best is None else f" (it looks like one of {best.name})"
