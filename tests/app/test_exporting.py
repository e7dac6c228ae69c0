"""``pp-lightning export`` as a user types it."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.app.conftest import VOCABULARY, save
from tests.app.test_cli import REPOSITORY, refused
from tests.models import tiny

EXPORTED = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "pruning.json",
    "tokenizer.json",
    "tokenizer_config.json",
}

UNIFORM = ["--model.uniform", "true", "--model.skip_layers", "null"]


@pytest.fixture
def chosen(arguments):
    """Arguments of a static choice."""
    return {**arguments, "--model.method": "WandaSP", "--model.pruning_ratio": 0.4}


@pytest.fixture
def shallow(chosen, tmp_path_factory):
    """Arguments of a static choice in a model of three layers: graphs take their time for each."""
    folder = tmp_path_factory.mktemp("shallow")
    save(tiny("llama", vocab_size=VOCABULARY, num_hidden_layers=3), folder)
    return {**chosen, "--model.path": folder, "--model.pruning_ratio": 0.2}


def without_data(given):
    """The same with nothing said about texts."""
    return {key: value for key, value in given.items() if not key.startswith("--data")}


@pytest.mark.parametrize(
    "method", ["WandaSP", *(pytest.param(m, marks=pytest.mark.slow) for m in ("FLAP", "LLMPruner"))]
)
def test_what_is_exported_is_what_test_evaluates(method, type_in, chosen, tmp_path, capsys, stock_perplexity):
    given = {**chosen, "--model.method": method}
    assert type_in("export", given, extra=["--out", tmp_path / "model"]) == 0
    printed = capsys.readouterr().out
    assert "chosen anew" in printed and "--model.uniform true" in printed
    assert "-> uniform" in printed and "greedy tokens are equal" in printed
    assert {path.name for path in (tmp_path / "model").iterdir()} == EXPORTED
    assert type_in("test", given, extra=[*UNIFORM, "--out", tmp_path / "test"]) == 0
    row = json.loads((tmp_path / "test" / "results.json").read_text())["rows"][0]
    assert stock_perplexity(tmp_path / "model") == pytest.approx(row["perplexity"], rel=1e-5)
    assert row["kept"] == {"attention": [5, 5], "mlp": [96, 96]}
    assert type_in("test", given, extra=["--out", tmp_path / "other"]) == 0
    other = json.loads((tmp_path / "other" / "results.json").read_text())["rows"][0]
    assert other["perplexity"] != row["perplexity"]  # with layers skipped it is another choice


@pytest.mark.slow
@pytest.mark.parametrize("frozen_on", ["history", "text"])
def test_a_frozen_choice(frozen_on, type_in, chosen, tmp_path, stock_perplexity):
    given = {**chosen, "--model.method": "ProbePruning", "--model.frozen_on": frozen_on}
    assert type_in("export", given, extra=["--out", tmp_path / "model"]) == 0
    assert type_in("test", given, extra=[*UNIFORM, "--out", tmp_path / "test"]) == 0
    row = json.loads((tmp_path / "test" / "results.json").read_text())["rows"][0]
    assert stock_perplexity(tmp_path / "model") == pytest.approx(row["perplexity"], rel=1e-5)
    record = json.loads((tmp_path / "model" / "pruning.json").read_text())
    assert record["pruning"]["settings"]["frozen_on"] == frozen_on


def test_heads_alike_and_mlps_that_differ(type_in, chosen, tmp_path, capsys):
    given = {**chosen, "--model.method": "FLAP", "--model.uniform_heads": "true", "--model.tensor_parallel": 2}
    assert type_in("export", {**given, "--out": tmp_path / "model"}) == 0
    printed = capsys.readouterr().out
    assert "chosen anew" not in printed and "-> per-layer" in printed
    assert re.search(r"uniform heads: 6 in every layer; MLPs keep \d+ to \d+ channels", printed)
    assert "heads and channels divide among 2" in printed
    config = json.loads((tmp_path / "model" / "config.json").read_text())["per_layer_config"].values()
    assert {one["num_attention_heads"] for one in config} == {6}
    widths = {one["intermediate_size"] for one in config}
    assert len(widths) > 1 and all(width % 2 == 0 for width in widths)
    record = json.loads((tmp_path / "model" / "pruning.json").read_text())
    assert (record["asked"]["uniform_heads"], record["asked"]["tensor_parallel"]) == (True, 2)


def test_per_layer_keeps_the_choice_with_skipped_layers(type_in, chosen, tmp_path, capsys, in_stock_python):
    extra = ["--layout", "per-layer", "--out", tmp_path / "model"]
    assert type_in("export", {**chosen, "--model.method": "FLAP"}, extra=extra) == 0
    assert "chosen anew" not in capsys.readouterr().out
    widths = in_stock_python(
        "from transformers import AutoModelForCausalLM as A\n"
        f"model = A.from_pretrained({str(tmp_path / 'model')!r}, trust_remote_code=True)\n"
        "found = [layer.mlp.up_proj.out_features for layer in model.model.layers]"
    )
    assert widths[:2] == [160, 160] and min(widths) < 160


@pytest.mark.parametrize(("method", "file"), [("WandaSP", "statistics"), ("LLMPruner", "importances")])
def test_a_calibrated_model_needs_no_text(method, file, type_in, chosen, tmp_path, capsys):
    given = {**chosen, "--model.method": method, f"--model.{file}": tmp_path / f"{file}.safetensors"}
    assert type_in("export", given, extra=["--out", tmp_path / "first"]) == 0
    assert type_in("export", without_data(given), extra=["--out", tmp_path / "second"]) == 0
    assert "calibrated before" in capsys.readouterr().out
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    records = [json.loads((tmp_path / name / "pruning.json").read_text()) for name in ("first", "second")]
    assert records[0]["calibration"] == records[1]["calibration"]
    assert method == "LLMPruner" or records[0]["calibration"]["batches"] == 2


def test_dtype_is_kept_or_chosen(type_in, chosen, tmp_path):
    assert type_in("export", chosen, extra=["--out", tmp_path / "kept"]) == 0
    assert type_in("export", chosen, extra=["--dtype", "bfloat16", "--out", tmp_path / "chosen"]) == 0
    kept, half = (load_file(tmp_path / name / "model.safetensors") for name in ("kept", "chosen"))
    assert {weight.dtype for weight in kept.values()} == {torch.float32}
    assert all(torch.equal(weight, kept[name].bfloat16()) for name, weight in half.items())


def test_the_tokenizer_comes_along(type_in, chosen, tmp_path, place):
    assert type_in("export", chosen, extra=["--out", tmp_path / "model"]) == 0
    text = (place / "text.txt").read_text()
    found, own = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "model", place / "model"))
    assert found(text)["input_ids"] == own(text)["input_ids"]


@pytest.mark.parametrize("layout", ["uniform", "per-layer", "padded"])
def test_the_model_card_says_how_to_load_it(layout, type_in, chosen, tmp_path, in_stock_python):
    """Its lines, run as they stand, where it lies, in a process that has never heard of us."""
    assert type_in("export", chosen, extra=["--layout", layout, "--out", tmp_path / "model"]) == 0
    [code] = re.findall(r"```python\n(.*?)```", (tmp_path / "model" / "README.md").read_text(), re.DOTALL)
    code += "found = model(**tokenizer('hello world', return_tensors='pt')).logits.isfinite().all().item()\n"
    assert in_stock_python(code, tmp_path / "model") is True


@pytest.mark.slow
def test_an_export_can_be_pruned_again(type_in, chosen, tmp_path):
    """A mistral folder that was a llama is a model like any other."""
    assert type_in("export", chosen, extra=["--out", tmp_path / "once"]) == 0
    again = {**chosen, "--model.path": tmp_path / "once", "--model.pruning_ratio": 0.2}
    assert type_in("export", again, extra=["--out", tmp_path / "twice"]) == 0
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "twice").config
    assert (config.num_attention_heads, config.head_dim) == (4, 8)


def test_overwrite(type_in, chosen, tmp_path, capsys):
    out = ["--out", tmp_path / "model"]
    assert type_in("export", chosen, extra=out) == 0
    assert type_in("export", {**chosen, "--model.pruning_ratio": 0.2}, extra=out) == 2
    assert "--overwrite" in refused(capsys)
    assert type_in("export", {**chosen, "--model.pruning_ratio": 0.2}, extra=[*out, "--overwrite", "true"]) == 0
    assert json.loads((tmp_path / "model" / "pruning.json").read_text())["asked"]["pruning_ratio"] == 0.2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["WandaSP", "ProbePruning"])
def test_graphs(method, type_in, shallow, tmp_path, capsys):
    """A static choice with its skipped layers, and a dynamic one for batches of the data's size."""
    extra = ["--format", "onnx", "--out", tmp_path / "graph"]
    assert type_in("export", {**shallow, "--model.method": method}, extra=extra) == 0
    assert "loaded and checked" in capsys.readouterr().out
    record = json.loads((tmp_path / "graph" / "pruning.json").read_text())
    assert record["asked"]["skip_layers"] == [0, 1]
    assert (tmp_path / "graph" / "model.onnx").exists() and (tmp_path / "graph" / "tokenizer.json").exists()
    if method == "ProbePruning":
        assert record["batch"] == {"rows": 4, "tokens": 32}
        assert record["graph"]["inputs"][2] == "history.2.attention"
    else:
        assert record["graph"]["inputs"][3] == "past_key_values.0.key"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "phases"), [("pt2", ["tracing", "writing", "loading"]), ("safetensors", ["writing", "loading"])]
)
def test_an_export_tells_what_it_is_doing(form, phases, type_in, shallow, tmp_path, capsys):
    for wanted, told in (("true", phases), ("false", [])):
        given = {**shallow, "--trainer.enable_progress_bar": wanted, "--format": form, "--out": tmp_path / wanted}
        assert type_in("export", given) == 0
        lines = capsys.readouterr().err.splitlines()
        begun = [line.split()[0] for line in lines if line.startswith(("tracing", "writing", "loading"))]
        assert list(dict.fromkeys(begun)) == told  # a graph's phases tell their time when they end


MISTAKES = {
    "no method": ({"--model.method": "null"}, "needs a method: add --method pp"),
    "a choice per batch": ({"--model.method": "ProbePruning"}, "--model.frozen_on history"),
    "nothing to freeze on": (
        {"--model.method": "FullBatchProbing", "--model.frozen_on": "history"},
        "keeps no history",
    ),
    "ratio of one": ({"--model.pruning_ratio": 1.0}, r"must be in \[0, 1\)"),
    "folder without config": ({"--model.path": str(REPOSITORY / "tests")}, r"has no config.json"),
    "no such layout": ({"--layout": "diagonal"}, "layout"),
    "a layout for a graph": (
        {"--format": "onnx", "--layout": "padded"},
        "--layout is for --format safetensors or gguf",
    ),
    "no such format": ({"--format": "tflite"}, "format"),
    "no such dtype": ({"--dtype": "int3"}, "dtype"),
    "shards of no size": ({"--max_shard_size": "big"}, "max_shard_size"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(mistake, type_in, chosen, tmp_path, capsys):
    changes, message = MISTAKES[mistake]
    assert type_in("export", {**chosen, "--out": tmp_path / "out", **changes}) == 2
    assert re.search(message, refused(capsys))
    assert list(tmp_path.iterdir()) == []


def test_weights_that_do_not_match_the_config(type_in, chosen, tmp_path, capsys):
    path = save(tiny("llama", vocab_size=VOCABULARY), tmp_path / "model") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 128}))
    assert type_in("export", {**chosen, "--model.path": tmp_path / "model", "--out": tmp_path / "out"}) == 2
    assert str(tmp_path / "model") in refused(capsys)
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_not_finite(type_in, chosen, tmp_path, capsys):
    broken = tiny("llama", vocab_size=VOCABULARY)
    broken.model.layers[2].mlp.up_proj.weight.data[5, 5] = float("nan")
    given = {**chosen, "--model.path": save(broken, tmp_path / "model"), "--out": tmp_path / "out"}
    assert type_in("export", given) == 2
    assert "not finite" in refused(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_statistics_of_another_model(type_in, chosen, tmp_path, capsys):
    given = {**chosen, "--model.statistics": tmp_path / "statistics.safetensors"}
    assert type_in("export", given, extra=["--out", tmp_path / "first"]) == 0
    again = {**without_data(given), "--model.path": tmp_path / "first", "--out": tmp_path / "second"}
    assert type_in("export", again) == 2
    assert "another model" in refused(capsys)
    assert not (tmp_path / "second").exists()
