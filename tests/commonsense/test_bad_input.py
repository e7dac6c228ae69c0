"""Every row that cannot be used is an error with file and line; none is skipped."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pp_lightning.commonsense import CommonsenseData
from pp_lightning.commonsense.reading import read_questions
from pp_lightning.commonsense.tasks import task_named
from pp_lightning.errors import UserError
from tests.commonsense.samples import FILES, ROWS, data_of, write_samples


def spoilt(task: str, **fields: Any) -> list[Any]:
    """The task's rows with the second one changed; None removes a field."""
    rows: list[Any] = [dict(row) for row in ROWS[task]]
    rows[1] = {key: value for key, value in {**rows[1], **fields}.items() if value is not None}
    return rows


def arc(**fields: Any) -> dict[str, Any]:
    """The second ARC row's question with changed fields."""
    return {"question": {**ROWS["arc_easy"][1]["question"], **fields}}


BAD = [
    ("boolq", {"answer": None}, "the row has no answer"),
    ("boolq", {"answer": 2}, "the label 2 is outside the 2 choices"),
    ("boolq", {"answer": -1}, "the label -1 is outside the 2 choices"),
    ("boolq", {"answer": "maybe"}, "the label 'maybe' is not a number"),
    ("boolq", {"passage": "  "}, "the passage is empty"),
    ("boolq", {"question": 3}, "expected text in the field 'question'"),
    ("piqa", {"sol2": ""}, "the sol2 is empty"),
    ("piqa", {"goal": ""}, "the goal is empty"),
    ("hellaswag", {"label": ""}, "the row has no answer"),
    ("hellaswag", {"label": 4}, "the label 4 is outside the 4 choices"),
    ("hellaswag", {"ctx_a": " ", "ctx_b": ""}, "the context is empty"),
    ("hellaswag", {"endings": ["a", "[step]", "c", "d"]}, "the choice 2 is empty"),
    ("hellaswag", {"endings": "text"}, "expected a list of texts in the field 'endings'"),
    ("hellaswag", {"endings": ["a", 3]}, "expected a list of texts in the field 'endings'"),
    ("winogrande", {"answer": "3"}, "the label 3 is outside the choices 1 and 2"),
    ("winogrande", {"answer": ""}, "the row has no answer"),
    ("winogrande", {"sentence": "no blank here"}, "the sentence has no blank '_'"),
    ("winogrande", {"sentence": "all before _ "}, "the choice 1 is empty"),
    ("winogrande", {"option2": " "}, "the option2 is empty"),
    ("arc_easy", {"answerKey": None}, "the row has no answer"),
    ("arc_easy", {"answerKey": "A"}, "the answer 'A' is outside the choices 1, 2, 3"),
    ("arc_easy", arc(stem=""), "the stem is empty"),
    ("arc_easy", arc(choices=[{"text": "a", "label": "1"}] * 3), "are not different ones of A to E or 1 to 5"),
    ("arc_easy", arc(choices=[{"text": "a", "label": "1"}, {"text": "b", "label": "2"}]), "2 choices; questions of"),
    ("arc_easy", arc(choices=[{"text": "a"}]), "every choice needs a text and a label"),
    ("arc_easy", arc(choices=[{"text": 1, "label": k} for k in "123"]), "a choice's text and label must be text"),
    ("arc_easy", arc(choices=[{"text": t, "label": k} for t, k in ("a1", " 2", "c3")]), "the choice 2 is empty"),
    ("openbookqa", {"answerKey": "E"}, "the answer 'E' is outside the choices A, B, C, D"),
]


@pytest.mark.parametrize(("task", "fields", "message"), BAD)
def test_a_bad_row(task: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_samples(tmp_path, **{task: spoilt(task, **fields)})
    where = f"{folder / task / FILES[task]}, line 2"
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read_questions(task_named(task), str(folder))
    assert str(caught.value).startswith(where)
    assert "\n" not in str(caught.value)


TASKS_WITH_OTHERS = [
    ("boolq", "piqa", "no field 'passage', so this is no row of boolq (it looks like one of piqa)"),
    ("piqa", "winogrande", "no field 'goal', so this is no row of piqa (it looks like one of winogrande)"),
    ("hellaswag", "boolq", "no field 'activity_label', so this is no row of hellaswag (it looks like one of boolq)"),
    ("winogrande", "hellaswag", "no field 'option1'"),
    ("arc_easy", "boolq", "no field 'id', so this is no row of arc_easy (it looks like one of boolq)"),
    ("arc_easy", "openbookqa", "the id '8-343' is one of openbookqa"),
    ("openbookqa", "arc_challenge", "the id 'Made_4' is not one of openbookqa; is this a file of ARC?"),
    ("openbookqa", "piqa", "no field 'id', so this is no row of openbookqa (it looks like one of piqa)"),
]


@pytest.mark.parametrize(("task", "other", "message"), TASKS_WITH_OTHERS)
def test_a_file_of_another_task(task: str, other: str, message: str, tmp_path: Path) -> None:
    folder = write_samples(tmp_path, **{task: ROWS[other][:3] + ROWS[other][:1]})
    (folder / "piqa" / "valid-labels.lst").write_text("0\n" * (3 if task != "piqa" else len(ROWS[other][:3]) + 1))
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read_questions(task_named(task), str(folder))
    assert str(caught.value).startswith(f"{folder / task / FILES[task]}, line 1")


def test_the_rows_of_one_arc_set_in_the_place_of_the_other(tmp_path: Path) -> None:
    data = CommonsenseData(str(write_samples(tmp_path, arc_challenge=ROWS["arc_easy"])))
    data.questions("arc_easy")
    with pytest.raises(UserError, match=r"test.jsonl, line 1: these are the rows of arc_easy, not of arc_challenge"):
        data.questions("arc_challenge")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1: empty line"),
        (b'{"passage": "p", "question": "q", "answer": true}\n\n{}\n', "line 2: empty line"),
        (b"[1, 2]\n", "line 1: not a JSON object"),
        (b'{"passage": "p", "question": "q", "answer": true}\n{broken\n', "line 2: not a JSON object"),
        (b"\xff\xfe\n", "is not UTF-8 text"),
    ],
)
def test_files_that_cannot_be_read(content: bytes, message: str, tmp_path: Path) -> None:
    file = write_samples(tmp_path) / "boolq" / "validation.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(str(file))) as caught:
        read_questions(task_named("boolq"), str(tmp_path))
    assert message in str(caught.value)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file .*boolq/validation.jsonl: give a folder"):
        read_questions(task_named("boolq"), str(tmp_path))


@pytest.mark.parametrize(
    ("labels", "message"), [("1\n0\n", "valid-labels.lst, line 3"), ("1\n0\n0\n1\n", "valid.jsonl, line 4")]
)
def test_as_many_piqa_labels_as_rows(labels: str, message: str, tmp_path: Path) -> None:
    folder = write_samples(tmp_path)
    (folder / "piqa" / "valid-labels.lst").write_text(labels)
    with pytest.raises(UserError, match=f"{message}: the file ends here"):
        read_questions(task_named("piqa"), str(folder))


def test_a_bad_piqa_label_is_named_with_its_line(tmp_path: Path) -> None:
    folder = write_samples(tmp_path)
    (folder / "piqa" / "valid-labels.lst").write_text("1\n7\n0\n")
    with pytest.raises(UserError, match=r"valid.jsonl, line 2 \(valid-labels.lst, line 2\): the label 7 is outside"):
        read_questions(task_named("piqa"), str(folder))


def test_bad_settings(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no task 'sudoku': choose from boolq, piqa"):
        CommonsenseData(tasks=["sudoku"])
    for tasks in ([], ["piqa", "piqa"]):
        with pytest.raises(UserError, match="at least one task, and none twice"):
            CommonsenseData(tasks=tasks)
    for settings in ({"window": 1}, {"batch_size": 0}, {"limit": 0}, {"calibration_samples": 0}):
        with pytest.raises(UserError, match="must be at least"):
            CommonsenseData(**settings)
    data = data_of(write_samples(tmp_path), "opt", batch_size=4)
    with pytest.raises(UserError, match=r"arc_easy.test.jsonl, line 3: 5 choices do not fit into a batch of 4 rows"):
        list(data.test_batches("arc_easy"))


def test_json_has_no_silent_second_reading(tmp_path: Path) -> None:
    """A limit does not hide what is wrong further down."""
    rows = [*ROWS["boolq"], {"nothing": json.dumps({})}]
    folder = write_samples(tmp_path, boolq=rows)
    with pytest.raises(UserError, match="line 4"):
        read_questions(task_named("boolq"), str(folder), limit=1)
