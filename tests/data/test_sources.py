"""Text sources: the same text from a local file as from the hub, and errors that name file and line."""

import gzip
import json

import datasets
import pytest

from pp_lightning.data import C4, Embedded, TextFile, WikiText2
from pp_lightning.errors import UserError


def test_wikitext_rows_are_joined_as_the_hub_has_them(tmp_path):
    raw = " \n = Title = \n \n A first line . \n \n \n = = Part = = \n"
    (tmp_path / "wiki.raw").write_text(raw)
    rows = ["", " = Title = \n", "", " A first line . \n", "", "", " = = Part = = \n"]
    assert WikiText2(str(tmp_path / "wiki.raw")).text() == "\n\n".join(rows)


def test_wikitext_from_the_hub(monkeypatch):
    asked = {}

    def load(*names, split, **more):
        asked.update(names=names, split=split)
        return {"text": ["", " = T = \n"]}

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert WikiText2(split="validation").text() == "\n\n = T = \n"
    assert asked == {"names": ("Salesforce/wikitext", "wikitext-2-raw-v1"), "split": "validation"}


def test_hub_out_of_reach(monkeypatch):
    def load(*names, **more):
        raise ConnectionError("no route\nat all")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=r"cannot load allenai/c4 from the hub: give a local file, .* \(no route\)"):
        C4().documents()


@pytest.mark.parametrize("name", ["c4.jsonl", "c4.jsonl.gz"])
def test_json_lines(tmp_path, name):
    path = tmp_path / name
    opener = gzip.open if name.endswith(".gz") else open
    with opener(path, "wt") as file:
        file.write(json.dumps({"text": "one", "url": "x"}) + "\n\n" + json.dumps({"text": "zwei ü"}) + "\n")
    assert C4(str(path)).documents() == ["one", "zwei ü"]


@pytest.mark.parametrize("line", ["{", '{"txt": "a"}', '["text"]', '{"text": 3}'])
def test_bad_line_is_named(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2"):
        C4(str(path)).documents()


def test_damaged_gzip(tmp_path):
    path = tmp_path / "c4.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:40])
    with pytest.raises(UserError, match="cannot read"):
        C4(str(path)).documents()


@pytest.mark.parametrize("source", [WikiText2, TextFile, C4])
def test_missing_file(source, tmp_path):
    with pytest.raises(UserError, match="give the path of an existing"):
        source(str(tmp_path / "nothing")).documents()


def test_text_that_is_not_utf8(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="not UTF-8"):
        TextFile(str(path)).documents()


def test_description_tells_texts_apart(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = TextFile(str(path)).describe()
    path.write_text("two")
    assert TextFile(str(path)).describe()["sha256"] != first["sha256"]
    assert Embedded("test").describe()["part"] == "test"
