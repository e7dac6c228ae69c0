"""Folders in engines: each engine's smallest case, where it is installed; and what a check accepts."""

import json
import re
from dataclasses import replace

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel

from pp_lightning import UserError
from pp_lightning.export import export_checkpoint, export_graph
from pp_lightning.export.engines.check import Expected, check_with
from pp_lightning.export.engines.choice import FORMATS, choice_for
from pp_lightning.export.engines.run import RUNNERS, Answer, ask, interpreter_of
from pp_lightning.export.gguf_file import export_gguf
from tests.commonsense.tokenizers import tokenizer_of
from tests.export.engine_models import small_pruned
from tests.models import config

slow = pytest.mark.slow


@slow
@pytest.mark.parametrize("engine", RUNNERS)
def test_the_smallest_case(engine, tmp_path):
    """Layers with counts of their own, grouped queries and biases."""
    if interpreter_of(engine) is None:
        pytest.skip(f"{engine} is not installed: make test-engines, then set PP_LIGHTNING_ENGINES to .engines")
    model, out, tokenizer = small_pruned("llama_gqa", "flap", "per-layer"), tmp_path / "out", tokenizer_of("byte_level")
    expected = Expected.of(model)
    if FORMATS[engine] == "gguf":
        pytest.importorskip("gguf")
        export_gguf(model, out, tokenizer=tokenizer, layout="per-layer")
    elif FORMATS[engine] == "onnx":
        export_graph(model, out, form="onnx", tokenizer=tokenizer)
    else:
        export_checkpoint(model, out, tokenizer=tokenizer, layout="per-layer")
    check = check_with(engine, out, expected, exact=True)
    assert check.same_tokens == check.of_tokens > 0 and check.version


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """A model's own answers, and a check of them as changed."""
    expected = Expected.of(small_pruned("llama"))

    def check(exact=True, **changes):
        answer = replace(Answer("engine 1", expected.tokens, expected.losses, []), **changes)
        monkeypatch.setattr("pp_lightning.export.engines.check.ask", lambda *_, **__: answer)
        return check_with("vllm", tmp_path, expected, exact=exact)

    return expected, check


def test_a_loss_or_a_token_that_differs_is_no_agreement(asked):
    expected, check = asked
    assert check().same_tokens == 3 * 32
    with pytest.raises(UserError, match=r"losses off by 2\.0e-03"):
        check(losses=[loss * 1.002 for loss in expected.losses])
    unlikely = [int(row[-1].argmin()) for row in expected.step_logits]
    other = [[*row[:-1], token] for row, token in zip(expected.tokens, unlikely, strict=True)]
    with pytest.raises(UserError, match="93 of 96 greedy tokens"):
        check(tokens=other)
    assert check(exact=False, tokens=other).same_tokens == 93  # half precision: counted only


def test_a_tie_ends_the_comparison_of_its_row(asked):
    expected, check = asked
    second = int(expected.step_logits[0, 5].topk(2).indices[1])
    expected.step_logits[0, 5, second] = expected.step_logits[0, 5].max() - 1e-4
    tokens = [[*expected.tokens[0][:5], second, *[0] * 26], *expected.tokens[1:]]
    found = check(tokens=tokens)
    assert (found.same_tokens, found.of_tokens) == (5 + 64, 5 + 64)


def test_an_environment_is_found_from_anywhere(tmp_path, monkeypatch):
    """Its folder may be named from where the user stands; the engine runs in another one."""
    python = tmp_path / "engines" / "vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PP_LIGHTNING_ENGINES", "engines")
    assert interpreter_of("vllm") == str(python)


def test_an_engine_that_fails_is_named_with_its_version(tmp_path, monkeypatch):
    failing = replace(RUNNERS["transformers"], script="no_such_runner")
    monkeypatch.setitem(RUNNERS, "transformers", failing)
    told = (
        f"transformers {transformers.__version__} cannot run out: ModuleNotFoundError: No module named 'no_such_runner'"
    )
    with pytest.raises(UserError, match=f"^{re.escape(told)}$"):
        ask("transformers", tmp_path / "out")


def test_what_is_chosen_for_an_engine():
    llama, qwen3 = config("llama"), config("qwen3", use_sliding_window=False, layer_types=None)
    chosen = choice_for("llama.cpp", llama, own_counts=True, format=None, layout=None)
    assert (chosen.format, chosen.layout) == ("gguf", "per-layer")
    assert choice_for("llama.cpp", qwen3, own_counts=True, format=None, layout=None).layout == "uniform"
    assert choice_for("vllm", qwen3, own_counts=True, format=None, layout=None).layout == "per-layer"
    assert choice_for("transformers", llama, own_counts=False, format=None, layout=None).layout == "uniform"
    assert choice_for("openvino", llama, own_counts=True, format="onnx", layout=None).layout is None
    with pytest.raises(UserError, match="openvino loads onnx"):
        choice_for("openvino", llama, own_counts=True, format="safetensors", layout=None)


@slow
def test_a_graph_explains_itself(tmp_path):
    """Configs of transformers and ONNX Runtime GenAI, sizes with names, and lines that run as they stand."""
    onnx = pytest.importorskip("onnx")
    model = small_pruned("llama_gqa", "flap", "per-layer")
    export_graph(model, tmp_path / "out", form="onnx", tokenizer=tokenizer_of("byte_level"))
    genai = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]
    assert (genai["decoder"]["num_hidden_layers"], genai["decoder"]["head_size"], genai["vocab_size"]) == (5, 32, 1024)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    assert (tmp_path / "out" / "generation_config.json").exists()
    inputs = {one.name: one for one in onnx.load(tmp_path / "out" / "model.onnx").graph.input}
    for name, sizes in (("input_ids", ["batch", "sequence"]), ("attention_mask", ["batch", "total_sequence"])):
        assert [one.dim_param for one in inputs[name].type.tensor_type.shape.dim] == sizes
    past = inputs["past_key_values.4.value"].type.tensor_type.shape.dim
    assert (past[0].dim_param, past[2].dim_param, past[3].dim_value) == ("batch", "past", 32)
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    found: dict = {}
    exec(code.replace('"model.onnx"', repr(str(tmp_path / "out" / "model.onnx"))), found)
    with torch.no_grad():
        wanted = model(torch.tensor([[1, 2, 3]])).logits
    torch.testing.assert_close(torch.from_numpy(found["logits"]), wanted, rtol=0, atol=1e-4)


def test_folders_that_older_versions_read(tmp_path):
    export_checkpoint(small_pruned("llama_gqa"), tmp_path / "out", tokenizer=tokenizer_of("byte_level"))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"]
    tokenizer = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "base_model: a model in memory" in (tmp_path / "out" / "README.md").read_text()


def test_per_layer_folders_have_a_base_model(tmp_path):
    """What vLLM builds its own model around, with the counts of each layer where it looks for them."""
    model = small_pruned("llama_gqa", "flap", "per-layer")
    export_checkpoint(model, tmp_path / "out", layout="per-layer")
    settings = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    found = AutoModel.from_config(settings, trust_remote_code=True)
    assert type(found).__name__ == "PrunedModel"
    shapes = {name: tuple(one.shape) for name, one in model.named_parameters() if name.startswith("model.")}
    assert {f"model.{name}": tuple(one.shape) for name, one in found.named_parameters()} == shapes
    heads = [one.num_attention_heads for one in settings.per_layer_config]
    assert heads == [layer.self_attn.o_proj.in_features // 32 for layer in found.layers]
