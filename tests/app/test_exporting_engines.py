"""``pp-lightning export --format gguf``, ``--for`` and ``--check-with`` as a user types them."""

import json
import re

import pytest

from pp_lightning.export.engines.run import RUNNERS, Answer, interpreter_of
from tests.app.conftest import VOCABULARY, save
from tests.app.test_cli import refused
from tests.export.engine_models import small

gguf = pytest.importorskip("gguf")


@pytest.fixture
def chosen(arguments):
    return {**arguments, "--model.method": "FLAP", "--model.pruning_ratio": 0.4}


def test_for_llama_cpp_keeps_the_choice(type_in, chosen, tmp_path, capsys):
    """FLAP's own counts and skipped layers, with biases, nothing padded."""
    assert type_in("export", chosen, extra=["--for", "llama.cpp", "--out", tmp_path / "out"]) == 0
    printed = capsys.readouterr().out
    assert "for llama.cpp: format gguf, layout per-layer" in printed and "chosen anew" not in printed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", "model.gguf", "pruning.json"}
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    widths = fields["deci.feed_forward_length"].contents()
    assert widths[:2] == [160, 160] and min(widths) < 160
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: model" in card and "llama-cli -m model.gguf" in card


def test_gguf_with_the_same_counts_in_every_layer(type_in, chosen, tmp_path, capsys):
    extra = ["--format", "gguf", "--quantize", "q8_0", "--out", tmp_path / "out"]
    assert type_in("export", chosen, extra=extra) == 0
    printed = capsys.readouterr().out
    assert "chosen anew" in printed and "architecture llama" in printed
    assert json.loads((tmp_path / "out" / "pruning.json").read_text())["written"]["type"] == "q8_0"


@pytest.mark.parametrize(
    ("engine", "method", "told"),
    [
        ("vllm", "FLAP", "safetensors, layout per-layer: .*--trust-remote-code"),
        ("transformers", "FLAP", "safetensors, layout per-layer: .*trust_remote_code=True"),
    ],
)
def test_what_is_chosen_for_an_engine_is_told(engine, method, told, type_in, chosen, tmp_path, capsys):
    given = {**chosen, "--model.method": method}
    assert type_in("export", given, extra=["--for", engine, "--out", tmp_path / "out"]) == 0
    assert re.search(f"for {engine}: format {told}", capsys.readouterr().out)


def answered(monkeypatch, spoil):
    """As if llama.cpp were installed: it gives what the model gave, but for what is spoiled."""
    monkeypatch.setattr("pp_lightning.app.export_plan.check_installed", lambda engine: "python")

    def ask(engine, folder, *, windows, steps, **_):
        tokens = [window[-steps:] for window in windows]
        return spoil(Answer("llama.cpp 1.0", tokens, [1e9] * len(windows), []))

    monkeypatch.setattr("pp_lightning.export.engines.check.ask", ask)


def test_an_engine_that_disagrees_is_said_and_the_export_stays(type_in, chosen, tmp_path, capsys, monkeypatch):
    answered(monkeypatch, lambda answer: answer)
    extra = ["--for", "llama.cpp", "--check-with", "[llama.cpp]", "--out", tmp_path / "out"]
    assert type_in("export", chosen, extra=extra) == 2
    output = capsys.readouterr()
    assert "not confirmed by llama.cpp: llama.cpp 1.0 computes something else" in output.out
    assert "did not confirm it" in output.err and (tmp_path / "out" / "model.gguf").exists()


MISTAKES = {
    "another format": ({"--for": "llama.cpp", "--format": "onnx"}, "llama.cpp loads gguf: leave --format out"),
    "no cache": ({"--for": "onnxruntime-genai", "--kv_cache": "false"}, "--kv_cache true"),
    "a choice per batch": ({"--for": "openvino", "--model.method": "ProbePruning"}, "--model.frozen_on history"),
    "a choice per batch in a file": ({"--for": "llama.cpp", "--model.method": "ProbePruning"}, "--model.frozen_on"),
    "quantised folder": ({"--quantize": "q8_0"}, "--quantize q8_0 is for --format gguf"),
    "int8 in a gguf": ({"--quantize": "int8", "--format": "gguf"}, "a GGUF takes q8_0"),
    "int8 in a graph": ({"--quantize": "int8", "--format": "onnx"}, "--quantize int8 is for --format safetensors"),
    "no such engine": ({"--for": "engine9"}, "engine"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(mistake, type_in, chosen, tmp_path, capsys):
    changes, message = MISTAKES[mistake]
    assert type_in("export", {**chosen, "--out": tmp_path / "out", **changes}) == 2
    assert re.search(message, refused(capsys))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("family", "extra", "wanted"),
    [
        ("opt", ["--for", "llama.cpp"], ["model type 'opt'", "--for vllm"]),
        ("qwen3", ["--for", "llama.cpp"], ["reads no biases", "--for vllm"]),
        ("qwen3", [], ["no stock class holds", "biases in down_proj, o_proj", "use --layout per-layer"]),
        ("qwen3", ["--for", "vllm", "--layout", "padded"], ["no stock class holds", "use --layout per-layer"]),
    ],
)
def test_what_no_engine_or_class_holds_is_refused_before_any_work(
    family, extra, wanted, type_in, chosen, tmp_path, capsys, monkeypatch
):
    def never(*_, **__):
        raise AssertionError("calibrated")

    monkeypatch.setattr("pp_lightning.app.module.PrunedLM.prune", never)
    folder = save(small(family, vocab_size=VOCABULARY), tmp_path / family)
    given = {**chosen, "--model.path": folder, "--out": tmp_path / "out"}
    assert type_in("export", given, extra=extra) == 2
    line = refused(capsys)
    assert all(words in line for words in wanted)
    assert not (tmp_path / "out").exists()


def test_biases_of_attention_alone_have_a_class(type_in, chosen, tmp_path):
    """The negative control: Qwen3's own class reads a bias of this output, and not of MLPs."""
    folder = save(small("qwen3", vocab_size=VOCABULARY), tmp_path / "qwen3")
    given = {**chosen, "--model.path": folder, "--out": tmp_path / "out", "--model.mlp_ratio": 0.0}
    assert type_in("export", given) == 0


def test_an_engine_that_is_not_installed(type_in, chosen, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PP_LIGHTNING_ENGINES", str(tmp_path / "nowhere"))
    monkeypatch.setattr("pp_lightning.export.engines.run.find_spec", lambda _: None)
    assert interpreter_of("vllm") is None
    assert type_in("export", chosen, extra=["--check-with", "[vllm]", "--out", tmp_path / "out"]) == 2
    line = refused(capsys)
    assert "vllm is not installed here" in line and RUNNERS["vllm"].install in line
    assert list(tmp_path.iterdir()) == []
