"""Texts of the seven tasks, and the traps of scoring them."""

from pathlib import Path
from typing import Any

import pytest

from pp_lightning.commonsense.encoding import encode_questions
from pp_lightning.commonsense.reading import read_questions
from pp_lightning.commonsense.rows import Question, Row
from pp_lightning.commonsense.tasks import TASK_NAMES, task_named
from pp_lightning.errors import UserError
from tests.commonsense.samples import ROWS, write_samples
from tests.commonsense.tokenizers import KINDS, tokenizer_of


def parse(task: str, **fields: Any) -> Question:
    return task_named(task).question(Row(fields, "here, line 1"))


def encoded(kind: str, context: str, *choices: str, window: int = 64) -> Any:
    question = Question((context,) * len(choices), choices, 0, "here, line 1")
    return encode_questions(tokenizer_of(kind), [question], window)[0].rows


def test_names_and_order() -> None:
    expected = ["boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"]
    assert list(TASK_NAMES) == expected


def test_boolq() -> None:
    question = parse("boolq", passage="P.", question="is it", answer=True)
    assert question.contexts == ("P.\nQuestion: is it?\nAnswer:",) * 2
    assert question.continuations == (" no", " yes") and question.gold == 1
    assert parse("boolq", passage="P.", question="is it", label=0).gold == 0
    assert parse("boolq", passage="P.", question="is it", answer=False).gold == 0
    assert question.characters == (2, 3)


def test_hellaswag_text_is_cleaned_as_in_the_harness() -> None:
    row = {"activity_label": "Wash", "ctx_a": " [header] How [title] Take  it.", "ctx_b": "THE man [x y] is"}
    question = parse("hellaswag", **row, endings=[" a [title] b", "c [step] d", "e   f"], label="2")
    assert question.contexts[0] == "Wash:  How. Take it. The man is"
    assert question.continuations == (" a. b", " c d", " e  f") and question.gold == 2


def test_piqa_labels_come_from_their_own_file(tmp_path: Path) -> None:
    """The published code's one-hot reading of these labels makes a good model score ten per cent."""
    questions = read_questions(task_named("piqa"), str(write_samples(tmp_path)))
    assert [question.gold for question in questions] == [1, 0, 0]
    assert questions[0].contexts[0] == "Question: clean a cage\nAnswer:"
    assert questions[0].continuations[1] == " use a much larger amount of ethanol "  # as it stands in the file


def test_winogrande_scores_what_follows_the_blank() -> None:
    question = parse("winogrande", sentence="I saw _ ran  off. ", option1="Al", option2="Bo", answer="2")
    assert question.contexts == ("I saw Al", "I saw Bo")
    assert question.continuations == (" ran  off.", " ran  off.") and question.gold == 1


@pytest.mark.parametrize("number", [3, 4, 5])
@pytest.mark.parametrize("labels", ["ABCDE", "12345"])
@pytest.mark.parametrize("task", ["arc_easy", "arc_challenge", "openbookqa"])
def test_three_to_five_choices_in_both_formats(task: str, labels: str, number: int) -> None:
    texts, keys = ["a", "b", "c", "d", "e"][:number], list(labels)[:number]
    ident = "8-1" if task == "openbookqa" else "Mercury_1"
    nested = [{"text": text, "label": key} for text, key in zip(texts, keys, strict=True)]
    local = parse(task, id=ident, question={"stem": "Why?", "choices": nested}, answerKey=keys[-1])
    stem = "question_stem" if task == "openbookqa" else "question"
    hub = parse(task, id=ident, **{stem: "Why?"}, choices={"text": texts, "label": keys}, answerKey=keys[-1])
    assert local == hub
    assert local.contexts[0] == ("Why?" if task == "openbookqa" else "Question: Why?\nAnswer:")
    assert local.continuations == tuple(f" {text}" for text in texts) and local.gold == number - 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_choice_keeps_its_leading_space(kind: str) -> None:
    """Scored alone, a byte-level choice would lose its space and LLaMA-2's would gain a lone marker."""
    tokenizer = tokenizer_of(kind)
    (row,) = encoded(kind, "Question: why?\nAnswer:", " the plants")
    whole = tokenizer.encode("Question: why?\nAnswer: the plants")
    assert [*row.inputs, row.continuation[-1]] == whole
    assert tokenizer.decode(row.continuation).strip() == "the plants"
    alone = tokenizer.encode(" the plants", add_special_tokens=False)
    assert (list(row.continuation) == alone) == (kind != "metaspace")


@pytest.mark.parametrize("kind", KINDS)
def test_context_and_choice_are_tokenised_together(kind: str) -> None:
    """The split is where the context's own tokens end, even where the two merge across it."""
    tokenizer = tokenizer_of(kind)
    (row,) = encoded(kind, "The stat", "ement is executed later")
    apart = tokenizer.encode("The stat") + tokenizer.encode("ement is executed later", add_special_tokens=False)
    together = tokenizer.encode("The statement is executed later")
    assert together != apart
    context = tokenizer.encode("The stat")
    assert list(row.continuation) == together[len(context) :]
    assert list(row.inputs) == (context + together[len(context) :])[:-1]


@pytest.mark.parametrize("kind", KINDS)
def test_spaces_at_the_end_of_a_context_belong_to_the_choice(kind: str) -> None:
    (row,) = encoded(kind, "The blank  ", " water")
    (same,) = encoded(kind, "The blank", "   water")
    assert row == same


@pytest.mark.parametrize(("kind", "first"), [("metaspace", "<s>"), ("opt", "</s>"), ("byte_level", None)])
def test_the_tokenizers_own_bos_and_only_one(kind: str, first: str | None) -> None:
    tokenizer = tokenizer_of(kind)
    (row,) = encoded(kind, "A man", " sits")
    if first is None:
        assert tokenizer.decode(row.inputs[:1]) == "A"
        return
    bos = tokenizer.convert_tokens_to_ids(first)
    assert row.inputs[0] == bos and row.inputs.count(bos) == 1 and bos not in row.continuation
    (marked,) = encoded(kind, f"{first}A man", " sits")
    assert marked.inputs.count(bos) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_long_contexts_are_cut_on_the_left(kind: str) -> None:
    (whole,) = encoded(kind, "one two three four five six seven", " eight", window=64)
    length = len(whole.inputs)
    (exact,) = encoded(kind, "one two three four five six seven", " eight", window=length)
    assert exact == whole and whole.cut == 0
    (cut,) = encoded(kind, "one two three four five six seven", " eight", window=length - 2)
    assert cut.inputs == whole.inputs[2:] and cut.continuation == whole.continuation and cut.cut == 2


def test_a_choice_that_alone_exceeds_the_window() -> None:
    size = len(encoded("opt", "Why?", " because of all the plants")[0].continuation)
    assert encoded("opt", "Why?", " because of all the plants", window=size)[0].cut > 0
    with pytest.raises(UserError, match=f"here, line 1: a choice alone has {size} tokens"):
        encoded("opt", "Why?", " because of all the plants", window=size - 1)


def test_hub_rows_go_through_the_same_parsers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, name: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((path, name, split))
        return [{"goal": "clean", "sol1": "water", "sol2": "fire", "label": 1}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    (question,) = read_questions(task_named("piqa"))
    assert asked == [("baber/piqa", None, "validation")]
    assert question.gold == 1 and question.origin == "baber/piqa validation, row 1"

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(UserError, match=r"cannot load baber/piqa validation from the hub \(no network\): give a local"):
        read_questions(task_named("piqa"))


def test_all_rows_are_read_in_order(tmp_path: Path) -> None:
    folder = str(write_samples(tmp_path))
    for name in TASK_NAMES:
        questions = read_questions(task_named(name), folder)
        assert len(questions) == len(ROWS[name])
        assert [f"line {number}" in question.origin for number, question in enumerate(questions, 1)] == [True] * len(
            questions
        )
        assert read_questions(task_named(name), folder, limit=2) == questions[:2]
