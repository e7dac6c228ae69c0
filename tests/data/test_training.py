import json

import pytest
import torch

from pp_lightning import UserError
from pp_lightning.data import C4, FirstWindows, Instructions, Packed, TextFile

END = 99


def encode(text):
    """One token a word, with one in front."""
    return [1, *(10 + len(word) for word in text.split())]


@pytest.fixture
def documents(tmp_path):
    file = tmp_path / "documents.jsonl"
    lengths = [3, 8, 2, 9, 12, 1, 7]
    file.write_text(
        "".join(json.dumps({"text": " ".join("a" * (n % 5 + 1) for _ in range(n))}) + "\n" for n in lengths)
    )
    return C4(str(file))


def test_packed_windows_join_documents(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("a bb ccc dddd")
    rows = Packed([TextFile(str(file)), TextFile(str(file))]).rows(encode, 4, END)
    assert [row.tolist() for row, _ in rows] == [[1, 11, 12, 13], [14, END, 1, 11], [12, 13, 14, END]]
    assert all(torch.equal(ids, labels) for ids, labels in rows)


def test_first_windows_of_long_documents(documents):
    rows = FirstWindows(documents).rows(encode, 6, END)
    starts = {tuple(row.tolist()) for row, _ in rows}
    assert starts == {(1, *[10 + n % 5 + 1] * 5) for n in (8, 9, 12, 7)}
    assert FirstWindows(documents, documents=2).rows(encode, 6, END)[0][0].tolist() == rows[0][0].tolist()
    other = FirstWindows(documents, seed=3).rows(encode, 6, END)
    assert [r.tolist() for r, _ in other] != [r.tolist() for r, _ in rows]


def test_too_few_documents(documents):
    with pytest.raises(UserError, match="4 documents have more than 6 tokens and 5 are asked for"):
        FirstWindows(documents, documents=5).rows(encode, 6, END)


@pytest.fixture
def instructions(tmp_path):
    given = [
        {"instruction": "say it", "input": "some context", "output": "well then"},
        {"instruction": "say it", "output": "a longer answer of seven words here"},
    ]
    file = tmp_path / "instructions.json"
    file.write_text(json.dumps(given))
    lines = tmp_path / "instructions.jsonl"
    lines.write_text("".join(json.dumps(fields) + "\n" for fields in given))
    return file, lines


def test_only_the_answer_is_predicted(instructions):
    for file in instructions:
        rows = Instructions(str(file)).rows(encode, 40, END)
        answers = sorted(labels[labels != -100].tolist() for _, labels in rows)
        expected = [[*encode(answer)[1:], END] for answer in ("well then", "a longer answer of seven words here")]
        assert answers == sorted(expected)
        for ids, labels in rows:
            assert torch.equal(ids[labels != -100], labels[labels != -100])
        assert {len(ids) for ids, _ in rows} == {14, 15}  # the context is part of the first prompt


def test_long_answers_are_cut_and_long_prompts_refused(instructions):
    rows = Instructions(str(instructions[0])).rows(encode, 14, END)
    assert max(len(ids) for ids, _ in rows) == 14
    with pytest.raises(UserError, match=r"instruction \d of .* tokens before its answer"):
        Instructions(str(instructions[0])).rows(encode, 8, END)


@pytest.mark.parametrize(
    ("content", "message"),
    [('[{"instruction": "x"}]', "lacks the text"), ("[1]", "does not hold objects"), ("{", "cannot read")],
)
def test_bad_instructions(tmp_path, content, message):
    file = tmp_path / "bad.json"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        Instructions(str(file)).rows(encode, 20, END)
    with pytest.raises(UserError, match="no file of instructions"):
        Instructions(str(tmp_path / "nowhere.json")).rows(encode, 20, END)


def test_impossible_sizes():
    with pytest.raises(UserError, match="need a window of at least 2"):
        FirstWindows(C4("x"), window=1)
