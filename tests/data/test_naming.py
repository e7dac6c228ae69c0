"""Texts by their names: the suffix of a file chooses its reader, and every form gives the same documents."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from pp_lightning.data import C4, Embedded, HubText, Records, TextFile, WikiText2
from pp_lightning.errors import UserError
from pp_lightning.texts import source_named, source_settings

DOCUMENTS = ["a first text", "a second one, with an umlaut: ü", "and a third"]


def write(path):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS)
    table = pyarrow.table({"text": DOCUMENTS, "n": [1, 2, 3]})
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    elif path.suffix == ".arrow":
        with pyarrow.OSFile(str(path), "wb") as out, pyarrow.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table)
    else:
        path.write_text(lines, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.arrow", "A.JSONL", "a.json.gz"])
def test_files_of_records_give_the_same_documents(name, tmp_path):
    source = source_named(write(tmp_path / name))
    assert isinstance(source, Records)
    assert list(source.documents()) == DOCUMENTS


def test_another_column(tmp_path):
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"words": DOCUMENTS}), file)
    assert list(Records(str(file), column="words").documents()) == DOCUMENTS
    with pytest.raises(UserError, match='no column "text": it has words'):
        Records(str(file)).documents()


def test_a_raw_file_is_in_wikitexts_form(tmp_path):
    """One file, one perplexity: it is read as ``WikiText2`` with this path reads it, not as plain text."""
    file = tmp_path / "wiki.test.raw"
    file.write_text(" = Title = \n \n a line \n")
    assert source_named(str(file)).text() == WikiText2(str(file)).text() != TextFile(str(file)).text()


def test_other_names(tmp_path):
    (tmp_path / "notes").write_text("plain")
    kinds = {"Embedded": Embedded, "C4": C4, "allenai/c4": C4, "Salesforce/wikitext": WikiText2, "org/name": HubText}
    kinds |= {str(tmp_path / "notes"): TextFile, "/nowhere/a.txt": TextFile, "../a": TextFile, "nowhere.raw": WikiText2}
    for name, kind in kinds.items():
        assert source_settings(name)["class_path"] == f"pp_lightning.data.{kind.__name__}", name
    assert vars(source_named("org/name"))["name"] == "org/name"


@pytest.mark.parametrize(
    ("name", "says"), [("embeded", "did you mean Embedded"), ("xyz", "choose from C4"), (" ", "needs")]
)
def test_names_that_are_none(name, says):
    with pytest.raises(UserError, match=says):
        source_named(name)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: the text holds half of a character"),
        ("a.jsonl", b'{"text": 7}\n', "line 1: the text must be a string"),
        ("a.jsonl", b'{"text": ' + b"[" * 20000 + b"]" * 20000 + b"}\n", "line 1: expected one JSON object"),
        ("a.jsonl.gz", b"no gzip", "cannot read"),
        ("a.parquet", b"PAR1", "damaged"),
        ("a.arrow", b"ARROW1", "damaged"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_damaged_files_are_named(name, content, says, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as refused:
        source_named(str(tmp_path / name)).documents()
    assert name in str(refused.value)
