"""GGUF files: read by transformers' own reader of them, by the gguf package, and by llama.cpp where it is installed."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pp_lightning import UserError, calibrate, prune_
from pp_lightning.export.engines.check import Expected, check_with
from pp_lightning.export.engines.run import ask, interpreter_of
from pp_lightning.export.gguf_file import export_gguf
from pp_lightning.export.gguf_plan import check_family, plan_for
from pp_lightning.export.gguf_tokenizer import tokenizer_fields
from pp_lightning.export.layouts import target_for
from pp_lightning.methods import WandaSP
from tests.commonsense.tokenizers import TEXT, tokenizer_of
from tests.export.engine_models import small, small_pruned
from tests.models import calibration_batches, config, ids, logits, tiny

gguf = pytest.importorskip("gguf")


def write(model, folder, layout="uniform", **more):
    return export_gguf(model, folder, tokenizer=tokenizer_of("byte_level"), layout=layout, **more)


def fields_of(folder):
    reader = gguf.GGUFReader(folder / "model.gguf")
    return {name: field.contents() for name, field in reader.fields.items()}


def test_transformers_reads_it_back(tmp_path):
    """Its own reader of GGUF undoes the order of rows; it knows heads as wide as the hidden size only."""
    model = small("llama_gqa")
    stats = calibrate(model, calibration_batches(), progress=False)
    prune_(model, WandaSP(blocks=("mlp",)), stats, pruning_ratio=0.4, round_to=32, skip_layers=())
    _, check = write(model, tmp_path / "out")
    assert (check.architecture, check.largest_difference) == ("llama", 0.0)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf").eval()
    torch.testing.assert_close(logits(found, ids()), logits(model, ids()), rtol=0, atol=1e-4)
    assert found.config.intermediate_size == 96


def test_the_tokenizer_goes_into_the_file(tmp_path):
    tokenizer = tokenizer_of("byte_level")
    tokenizer.chat_template = "{{ messages[0].content }}"
    try:
        write(small("llama"), tmp_path / "out")
    finally:
        tokenizer.chat_template = None
    text = "\n".join(TEXT[:50])
    found = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    assert found(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert fields_of(tmp_path / "out")["tokenizer.chat_template"] == "{{ messages[0].content }}"


def test_every_layer_has_its_own_counts(tmp_path):
    model = small_pruned("llama_gqa", "flap", "per-layer")
    _, check = write(model, tmp_path / "out", layout="per-layer")
    assert check.architecture == "deci"
    found, layers = fields_of(tmp_path / "out"), target_for("per-layer", model).layers
    assert found["deci.attention.head_count"] == [widths.heads for widths in layers]
    assert found["deci.attention.head_count_kv"] == [widths.groups for widths in layers]
    assert found["deci.feed_forward_length"] == [widths.channels for widths in layers]
    assert len(set(layers)) > 1
    assert (found["deci.attention.key_length"], found["deci.rope.dimension_count"]) == (32, 32)
    tensors = {one.name: one for one in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert {f"blk.{index}.attn_output.bias" for index in range(len(layers)) if index != 1} <= tensors.keys()
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert record["written"]["architecture"] == "deci" and record["pruning"]["method"] == "flap"


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "q8_0"])
def test_types(kind, tmp_path):
    model = small_pruned("llama")
    _, check = write(model, tmp_path / "out", kind=kind)
    assert 0 < check.largest_difference < {"float16": 1e-3, "bfloat16": 4e-3, "q8_0": 8e-3}[kind]
    full = write(model, tmp_path / "full")[1].bytes
    assert check.bytes < (0.65 if kind != "q8_0" else 0.4) * full
    norms = [one for one in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors if "norm" in one.name]
    assert {one.tensor_type.name for one in norms} == {"F32"}


def test_rows_that_q8_0_cannot_divide_are_told(tmp_path):
    model = tiny("llama", vocab_size=1024, intermediate_size=168)
    _, check = write(model, tmp_path / "out", kind="q8_0")
    assert len(check.kept_wider) == 5 and all("ffn_down" in name for name in check.kept_wider)


def test_a_tensor_that_came_back_different(tmp_path, monkeypatch):
    real = gguf.GGUFWriter.write_tensor_data

    def spoil(self, tensor, *arguments, **more):
        real(self, tensor + np.float32(0.5) if tensor.ndim == 2 else tensor, *arguments, **more)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", spoil)
    with pytest.raises(UserError, match="came back different"):
        write(small_pruned("llama"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_llama_3_rotary_scaling():
    """As transformers computes it."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    settings = config("llama", vocab_size=1024, hidden_size=256, rope_parameters=rope)
    model = AutoModelForCausalLM.from_config(settings)
    plan = plan_for(model, target_for("uniform", model))
    [factors] = [one.make() for one in plan.tensors if one.name == "rope_freqs.weight"]
    plain = 500000.0 ** -(torch.arange(0, 32, 2) / 32)
    torch.testing.assert_close(plain / factors, model.model.rotary_emb.inv_freq, rtol=1e-5, atol=0)


def test_a_fused_model_is_taken_apart():
    """phi3 has windows and rotates a part of a head in general; without both it is LLaMA's arithmetic."""
    model = small_pruned("phi3", layout="per-layer")
    plan = plan_for(model, target_for("per-layer", model))
    made = {one.name: one.make() for one in plan.tensors}
    fused = dict(model.named_parameters())["model.layers.2.mlp.gate_up_proj.weight"]
    assert torch.equal(torch.cat([made["blk.2.ffn_gate.weight"], made["blk.2.ffn_up.weight"]]), fused)
    assert all(one.shape == tuple(made[one.name].shape) for one in plan.tensors)


REFUSED = {
    "opt": ("no GGUF is written of model type 'opt'", "uniform"),
    "qwen3": ("--layout uniform or padded", "per-layer"),
    "gemma2": ("llama.cpp's gemma2 scales scores by the size of a head alone", "uniform"),
    "nemotron": ("no GGUF is written", "uniform"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_cannot_hold_is_refused_from_the_config(name):
    message, layout = REFUSED[name]
    with pytest.raises(UserError, match=message) as caught:
        check_family(tiny(name).config, layout)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "overrides", "message"), [
    ("mistral", {"sliding_window": 16}, "sliding windows"),
    ("llama", {"hidden_act": "gelu"}, "activation"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "yarn"),
    ("gemma2", {"query_pre_attn_scalar": 16, "final_logit_softcapping": None}, "always caps"),
    ("gemma2", {"query_pre_attn_scalar": 16, "tie_word_embeddings": False}, "no vocabulary projection of its own"),
    ("gemma3_text", {"hidden_activation": "silu"}, "no activation 'silu'"),
    ("gemma3_text", {"num_hidden_layers": 62, "layer_types": ["full_attention"] * 62}, "largest model"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "looks back only"),
    ("granite", {"hidden_act": "gelu"}, "no activation 'gelu'"),
])  # fmt: skip
def test_settings_that_llama_cpp_does_not_compute(name, overrides, message):
    with pytest.raises(UserError, match=message):
        check_family(config(name, **overrides), "uniform")


def test_biases_that_qwen3_does_not_read(tmp_path):
    with pytest.raises(UserError, match=r"reads no biases of output projections"):
        write(small_pruned("qwen3", "flap"), tmp_path / "out", layout="uniform")
    assert list(tmp_path.iterdir()) == []


def test_fields_of_a_tokenizer():
    fields = tokenizer_fields(tokenizer_of("metaspace"), 1030)
    assert (fields["ggml.model"], fields["ggml.add_bos_token"], fields["ggml.add_space_prefix"]) == (
        "llama",
        True,
        True,
    )
    assert fields["ggml.tokens"][-1] == "[PAD1029]" and fields["ggml.token_type"][:4] == [2, 3, 3, 6]
    fields = tokenizer_fields(tokenizer_of("opt"), 1024)
    assert (fields["ggml.model"], fields["ggml.pre"], fields["ggml.add_bos_token"]) == ("gpt2", "gpt-2", True)
    with pytest.raises(UserError, match="the model 10 rows"):
        tokenizer_fields(tokenizer_of("opt"), 10)


needs_llama_cpp = pytest.mark.skipif(
    interpreter_of("llama.cpp") is None,
    reason="llama.cpp is not installed: make test-engines, or pip install xllamacpp",
)


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize(("name", "method", "layout"), [
    ("llama_gqa", "flap", "per-layer"),
    ("qwen2", "flap", "per-layer"),
    ("phi3", "wanda_sp", "uniform"),
    ("qwen3", "wanda_sp", "uniform"),
    ("gemma", "wanda_sp", "uniform"),
    ("gemma2", "wanda_sp", "uniform"),
    ("gemma2", "wanda_sp", "padded"),
    ("gemma3_text", "wanda_sp", "uniform"),
    ("gemma3_text", "wanda_sp", "padded"),
    ("granite", "wanda_sp", "uniform"),
    ("granite", "flap", "uniform"),
    ("granite", "flap", "padded"),
])  # fmt: skip
def test_llama_cpp_runs_it(name, method, layout, tmp_path):
    model = small_pruned(name, method, layout)
    expected = Expected.of(model)
    write(model, tmp_path / "out", layout=layout)
    check = check_with("llama.cpp", tmp_path / "out", expected, exact=True)
    assert check.same_tokens == check.of_tokens > 0


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "opt"])
def test_llama_cpp_splits_texts_alike(kind, tmp_path):
    tokenizer, texts = tokenizer_of(kind), ["\n".join(TEXT[:200]), "  two  spaces\tand 1234 numbers, it's"]
    export_gguf(small("llama"), tmp_path / "out", tokenizer=tokenizer)
    found = ask("llama.cpp", tmp_path / "out", windows=[[1, 2]], texts=texts)
    assert found.texts == [tokenizer(text)["input_ids"] for text in texts]
