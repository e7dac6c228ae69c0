"""Exported folders load in unmodified transformers and compute what the pruned model computes."""

import json

import pytest
import torch
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from pp_lightning import UserError, calibrate, kept_units, prune_
from pp_lightning.export import export_checkpoint
from pp_lightning.export.costs import dense_parameters
from pp_lightning.export.entries import Entry
from pp_lightning.families import shape_of
from pp_lightning.flops import dense_flops
from pp_lightning.methods import FLAP, ProbePruning, StaticPPsp, WandaSP
from pp_lightning.tensor_files import write_tensors
from tests.models import (
    GROUPS,
    HEADS,
    MODELS,
    SETTINGS,
    calibration_batches,
    ids,
    logits,
    masked_dense,
    padded,
    statistics,
    tiny,
)

METHODS = {"wanda_sp": WandaSP, "ppsp": StaticPPsp, "flap": FLAP}
# The class of a folder with the same counts in every layer, and of a padded one: without biases, and with FLAP's.
STOCK = {
    "llama": {
        "uniform": ("MistralForCausalLM", "SeedOssForCausalLM"),
        "padded": ("LlamaForCausalLM", "LlamaForCausalLM"),
    },
    "llama_gqa": {
        "uniform": ("MistralForCausalLM", "SeedOssForCausalLM"),
        "padded": ("LlamaForCausalLM", "LlamaForCausalLM"),
    },
    "mistral": dict.fromkeys(("uniform", "padded"), ("MistralForCausalLM", None)),
    "qwen2": dict.fromkeys(("uniform", "padded"), ("Qwen2ForCausalLM", None)),
    "qwen3": dict.fromkeys(("uniform", "padded"), ("Qwen3ForCausalLM", None)),
    "opt": dict.fromkeys(("uniform", "padded"), ("OPTForCausalLM", "OPTForCausalLM")),
}


def pruned(name, method="wanda_sp", layout="uniform", **overrides):
    """A tiny model pruned as ``pp-lightning export`` prunes for a layout."""
    model, chosen, settings = tiny(name, **overrides), METHODS[method](), dict(SETTINGS)
    if layout == "uniform":
        chosen, settings["skip_layers"] = chosen.with_uniform_counts(), ()
    prune_(model, chosen, statistics(name), **settings)
    return model


def loaded(folder, **arguments):
    """The folder as a user loads it, with nothing missing and nothing left over."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **arguments)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@torch.no_grad()
def generated(model, text):
    """Eight greedy tokens with the key/value cache of ``generate``."""
    settings = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}
    return model.generate(**padded(text, left=2), **settings)


def measured_flops(folder, tokens, **arguments):
    """FLOPs of one row, counted by torch in the loaded model."""
    model = loaded(folder, attn_implementation="eager", **arguments)
    with FlopCounterMode(display=False) as counter:
        logits(model, ids(1, tokens))
    return counter.get_total_flops()


@pytest.mark.parametrize("layout", ["uniform", "per-layer", "padded"])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_every_combination(name, biases, layout, tmp_path):
    plain = "ppsp" if name in ("llama_gqa", "qwen2") else "wanda_sp"  # both leave weights without biases
    model, text, out = pruned(name, "flap" if biases else plain, layout), ids(), tmp_path / "out"
    trust = {"trust_remote_code": True} if layout == "per-layer" else {}
    expected = "PrunedForCausalLM" if layout == "per-layer" else STOCK[name][layout][biases]
    if expected is None:
        with pytest.raises(UserError, match="use --layout per-layer"):
            export_checkpoint(model, out, layout=layout)
        assert list(tmp_path.iterdir()) == []
        return
    costs, agreement = export_checkpoint(model, out, layout=layout)
    found = loaded(out, **trust)
    assert type(found).__name__ == expected
    torch.testing.assert_close(logits(found, text), logits(model, text), rtol=0, atol=1e-5)
    assert torch.equal(generated(found, text), generated(model, text))
    assert agreement.largest_difference <= 1e-5
    assert sum(weight.numel() for weight in found.parameters()) == costs.parameters
    assert costs.parameters / dense_parameters(model.config) == costs.parameters_ratio
    assert costs.parameters_ratio < 0.9 or layout == "padded"
    tokens = model.config.max_position_embeddings  # what the ratio is reported for
    dense = dense_flops(shape_of(model.config), 1, tokens).model
    assert measured_flops(out, tokens, **trust) / dense == pytest.approx(costs.flops_ratio, rel=1e-6)
    assert costs.flops_ratio < 0.9 or layout == "padded"


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_dense_model_without_the_removed_columns(name, tmp_path):
    """Against stock transformers and the kept units alone, not against our own slices."""
    model = pruned(name, layout="per-layer")
    kept = kept_units(model)
    export_checkpoint(model, tmp_path / "out", layout="padded")
    expected = masked_dense(tiny(name), kept, GROUPS if MODELS[name].grouped else HEADS)
    text = ids(seed=5)
    torch.testing.assert_close(logits(loaded(tmp_path / "out"), text), logits(expected, text), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(tiny(name), text), logits(expected, text), atol=1e-2)


def test_heads_that_divide_the_hidden_size_stay_llama(tmp_path):
    model = tiny("llama")
    prune_(model, FLAP(uniform=True), statistics("llama"), pruning_ratio=0.5, skip_layers=(), round_to=16)
    costs, _ = export_checkpoint(model, tmp_path / "out")
    assert costs.model_class == "LlamaForCausalLM"
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["num_attention_heads"], written["head_dim"], written["attention_bias"]) == (4, 8, True)
    found = loaded(tmp_path / "out")
    assert torch.count_nonzero(found.model.layers[0].self_attn.q_proj.bias) == 0
    assert torch.count_nonzero(found.model.layers[0].self_attn.o_proj.bias) > 0
    torch.testing.assert_close(logits(found, ids()), logits(model, ids()), rtol=0, atol=1e-5)


def test_qwen2_without_windows_and_flap_is_seed_oss(tmp_path):
    model = tiny("qwen2", use_sliding_window=False)
    stats = statistics("qwen2")
    prune_(model, FLAP(uniform=True), stats, **{**SETTINGS, "skip_layers": ()})
    costs, _ = export_checkpoint(model, tmp_path / "out")
    assert costs.model_class == "SeedOssForCausalLM"
    torch.testing.assert_close(logits(loaded(tmp_path / "out"), ids()), logits(model, ids()), rtol=0, atol=1e-5)


def test_shards_and_their_index(tmp_path):
    model = pruned("llama")
    export_checkpoint(model, tmp_path / "out", max_shard_size="100KB")
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 3 and all(shard.stat().st_size < 110_000 for shard in shards)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert {name for name in index["weight_map"]} == set(dict(model.named_parameters()))
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert torch.equal(logits(loaded(tmp_path / "out"), ids()), logits(model, ids()))


def test_a_shard_is_made_only_when_it_is_written(tmp_path, monkeypatch):
    """The tensors of the next are made after the file of the last was written."""
    events = []

    def make(entry, *, real=Entry.make):
        events.append("make")
        return real(entry)

    def write(*arguments, real=write_tensors):
        events.append("write")
        real(*arguments)

    monkeypatch.setattr(Entry, "make", make)
    monkeypatch.setattr("pp_lightning.export.weights.write_tensors", write)
    export_checkpoint(pruned("llama"), tmp_path / "out", max_shard_size="100KB", layout="padded")
    assert events.index("write") < events.index("make", events.index("write"))
    assert events.count("write") > 3


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_tied_weights_stay_tied(name, tmp_path):
    model = tiny(name, tie_word_embeddings=True)
    prune_(model, WandaSP(), calibrate(model, calibration_batches(), progress=False), **{**SETTINGS, "skip_layers": ()})
    export_checkpoint(model, tmp_path / "out")
    found = loaded(tmp_path / "out")
    assert found.get_output_embeddings().weight is found.get_input_embeddings().weight
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 (not a dict)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["uniform", "per-layer", "padded"])
def test_half_precision(dtype, layout, tmp_path):
    model = pruned("llama", "flap", layout)
    export_checkpoint(model, tmp_path / "out", layout=layout, dtype=dtype)
    found = loaded(tmp_path / "out", dtype="auto", trust_remote_code=layout == "per-layer")
    assert {weight.dtype for weight in found.parameters()} == {dtype}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    expected, got = logits(model, ids()), logits(found, ids())
    torch.testing.assert_close(got, expected, rtol=0, atol=8 * float(torch.finfo(dtype).eps * expected.abs().max()))


def test_the_model_is_given_up_only_where_asked(tmp_path):
    model = pruned("llama")
    before = logits(model, ids())
    export_checkpoint(model, tmp_path / "kept")
    assert torch.equal(logits(model, ids()), before)
    export_checkpoint(model, tmp_path / "released", release=True)
    assert {weight.device.type for weight in model.parameters()} == {"meta"}
    assert torch.equal(logits(loaded(tmp_path / "released"), ids()), before)


def test_record_and_card(tmp_path):
    model = pruned("llama", "flap")
    costs, _ = export_checkpoint(
        model, tmp_path / "out", provenance={"base_model": "some/model", "calibration": {"batches": 3}}
    )
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert record["base_model"] == {"name": "some/model", "model_type": "llama"}
    assert record["pruning"]["method"] == "flap" and record["pruning"]["settings"]["uniform"]
    for layer, units in kept_units(model).items():
        assert record["pruning"]["kept"][str(layer)] == {
            "attention": units.attention.tolist(),
            "mlp": units.mlp.tolist(),
        }
    assert record["calibration"] == {"batches": 3}
    assert record["written"]["parameters"] == costs.parameters
    assert record["check"]["largest_difference"] <= 1e-5
    assert set(record["versions"]) >= {"torch", "transformers", "python"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "some/model" in card and "SeedOssForCausalLM" in card and "(llama)" in card


def test_a_machine_path_is_not_published(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "secret-place")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "secret-place").eval()
    prune_(model, WandaSP(), statistics("llama"), **{**SETTINGS, "skip_layers": ()})
    export_checkpoint(model, tmp_path / "out")
    for path in (tmp_path / "out").glob("*.*"):
        assert b"secret-place" not in path.read_bytes(), path.name


def test_models_from_files_that_others_read(tmp_path):
    """Not for their owner's eyes only."""
    export_checkpoint(pruned("llama"), tmp_path / "out")
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1


def test_uneven_counts_do_not_fit_uniform(tmp_path):
    with pytest.raises(UserError, match="--layout per-layer or --layout padded"):
        export_checkpoint(pruned("llama", layout="per-layer"), tmp_path / "out", layout="uniform")
    assert list(tmp_path.iterdir()) == []


def test_a_choice_per_batch_fits_no_checkpoint(tmp_path):
    model = tiny("llama")
    prune_(model, ProbePruning(), statistics("llama"), **SETTINGS)
    with pytest.raises(UserError, match="freeze it first"):
        export_checkpoint(model, tmp_path / "out")


def test_weights_that_are_not_finite(tmp_path):
    model = pruned("llama")
    model.lm_head.weight.data[3, 3] = float("nan")
    with pytest.raises(UserError, match=r"lm_head.weight is not finite"):
        export_checkpoint(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_float16_that_overflows(tmp_path):
    model = pruned("llama")
    model.lm_head.weight.data[3, 3] = 1e6
    with pytest.raises(UserError, match="bfloat16 or float32"):
        export_checkpoint(model, tmp_path / "out", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []
