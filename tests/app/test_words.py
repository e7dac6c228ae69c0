"""What people type, as the parser takes it."""

import json

import pytest
import yaml

from pp_lightning.app.words import TRAINING_ROWS, config_settings, spelled_out
from pp_lightning.data import TrainingRows
from pp_lightning.errors import UserError
from pp_lightning.methods import ProbePruning, method_labels, method_named, name_of


def parsed(*words):
    """Options by name, without the command."""
    return dict(word.split("=", 1) for word in spelled_out(words)[1:])


def test_methods_have_the_same_names_everywhere():
    assert parsed("test", "--method", "flap") == parsed("export", "--model.method", "FLAP")
    assert parsed("test", "--method=pp") == parsed("prune", "--model.method", "ProbePruning")
    best = json.loads(parsed("lm", "--method", "best")["--model.method"])
    assert best["class_path"].endswith("ProbePruning") and best["init_args"]["token_ratio"] == 0.25
    updated = json.loads(parsed("test", "--method", "flap_updated")["--model.method"])
    assert updated["init_args"]["origin"]["class_path"].endswith("FLAP")
    assert parsed("compare", "--method", "pp") == {"--methods": "[pp]"}
    assert parsed("benchmark", "--method", "pp,flap") == {"--variants": "[pp,flap]"}
    assert parsed("test", "--model.method", "my.own.Method") == {"--model.method": "my.own.Method"}


def test_tables_show_the_name_that_was_given():
    for name in method_labels():
        assert name_of(method_named(name)) == name
    assert name_of(ProbePruning(token_ratio=0.25)) == "pp"  # a setting of its own makes no preset


def test_ways_to_make_training_rows_are_not_taken_for_texts():
    assert {one.__name__ for one in TrainingRows.__subclasses__()} == set(TRAINING_ROWS)
    for name in TRAINING_ROWS:
        assert parsed("fit", "--data.train", name) == {"--data.train": name}
    with pytest.raises(UserError, match="Paked"):
        parsed("fit", "--data.train", "Paked")


def test_lists_with_and_without_brackets():
    assert parsed("compare", "--methods", "pp,flap") == parsed("compare", "--methods", "[pp,flap]")
    assert parsed("compare", "--ratios=0.2,0.4") == {"--ratios": "[0.2,0.4]"}
    assert parsed("test", "--model.skip_layers", "0") == {"--model.skip_layers": "[0]"}


def test_texts_by_file_with_an_equals_sign_and_by_path_alone(tmp_path):
    file = tmp_path / "my.jsonl"
    file.write_text('{"text": "a"}\n')
    ways = (["--data.text", str(file)], [f"--data.text={file}"], ["--data.text.path", str(file)])
    first, *others = [parsed("test", *way) for way in ways]
    assert json.loads(first["--data.text"]) == {
        "class_path": "pp_lightning.data.Records",
        "init_args": {"path": str(file)},
    }
    assert all(other == first for other in others)
    named = parsed("test", "--data.text", "WikiText2", "--data.text.path", str(file))
    assert named["--data.text.path"] == str(file) and "WikiText2" in named["--data.text"]


def test_a_config_says_the_same(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text(yaml.safe_dump({"method": "pp", "data": {"text": "Embedded", "train": ["a.txt"]}}))
    settings = config_settings(str(file))
    assert settings["model"]["method"]["class_path"].endswith("ProbePruning") and "method" not in settings
    assert settings["data"]["text"]["class_path"] == "pp_lightning.data.Embedded"
    assert settings["data"]["train"] == [{"class_path": "pp_lightning.data.TextFile", "init_args": {"path": "a.txt"}}]
    (option,) = spelled_out(["test", "--config", str(file)])[1:]
    assert json.loads(option.removeprefix("--config=")) == settings


def test_a_path_beside_a_config_that_names_a_class(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text(yaml.safe_dump({"data": {"text": {"class_path": "pp_lightning.data.WikiText2"}}}))
    assert parsed("test", "--config", str(file), "--data.text.path", "x.raw")["--data.text.path"] == "x.raw"


def test_the_papers_calibration():
    assert parsed("test", "--paper") == {"--data.calibration_samples": "2000", "--data.window": "1024"}
    assert parsed("test", "--data", "commonsense", "--paper").keys() == {"--data", "--data.calibration_samples"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["test", "--method", "flapp"], "did you mean flap"),
        (["test", "--method", "Flop"], "did you mean flap"),
        (["test", "--data.text", "Embeded"], "did you mean Embedded"),
        (["test", "--data.window"], "--data.window needs a value"),
        (["test", "--data", "tasks"], "kind of data"),
        (["test", "--config", "/nowhere.yaml"], "no config file at /nowhere.yaml"),
    ],
)
def test_mistakes(words, says):
    with pytest.raises(UserError, match=says):
        spelled_out(words)
