"""Every family as a folder that transformers loads: in its own class where that can hold it, else layer by layer."""

import json
from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from pp_lightning import UserError, calibrate, kept_units, prune_
from pp_lightning.blocks import AttentionUnit, Block
from pp_lightning.export import compare_layouts, export_checkpoint, export_dynamic_graph, export_graph
from pp_lightning.export.sizes import PrunedSizes
from pp_lightning.methods import FLAP, ProbePruning, WandaSP
from pp_lightning.pruning import pruning_of
from tests.export.test_checkpoint import generated, loaded
from tests.models import FAMILIES, HEADS, calibration_batches, ids, logits, masked_dense, statistics, tiny

slow = pytest.mark.slow
# Classes with room for biases in all output projections.
BIASED = {
    "llama",
    "llama_gqa",
    "llama_bias",
    "opt",
    "smollm3",
    "granite",
    "starcoder2",
    "arcee",
    "nemotron",
    "seed_oss",
}
BIASED |= {"qwen3_moe", "granitemoe", "opt", "ernie4_5", "phi", "gpt_neox", "gpt_neox_sequential", "gpt_oss"}
BIASED |= {"falcon", "falcon_multi_query", "falcon_classic", "falcon_alibi"}
UNIFORM = ("gemma3_text", "phi3", "cohere2", "gpt_neox", "stablelm", "glm")
PER_LAYER = ("llama_gqa", "opt", "gemma3_text", "phi3")


def some(names):
    """These in every run of the tests, the other families among the slow ones."""
    return [name if name in names else pytest.param(name, marks=slow) for name in FAMILIES]


def pruned(name, method=WandaSP, **settings):
    model = tiny(name)
    given = {"pruning_ratio": 0.4, "skip_layers": (), "round_to": 16, **settings}
    prune_(model, method(blocks=FAMILIES[name].blocks), statistics(name), **given)
    return model


def most_units(model):
    """Units of attention in the layer that keeps most."""
    return max(len(units.attention) for units in kept_units(model).values())


def per_unit(model):
    """Query heads of one unit."""
    pruning = pruning_of(model)
    return 1 if pruning.plan.unit is AttentionUnit.QUERY_HEAD else pruning.shape.queries_per_key


def assert_equal(found, model):
    text = ids()
    torch.testing.assert_close(logits(found, text), logits(model, text), rtol=0, atol=1e-5)
    assert torch.equal(generated(found, text), generated(model, text))
    assert not torch.allclose(logits(model, text), logits(tiny(model.test_name), text), atol=1e-2)


def check(name, model, folder, layout, **trust):
    model.test_name = name
    costs, agreement = export_checkpoint(model, folder, layout=layout)
    found = loaded(folder, attn_implementation=FAMILIES[name].attention, **trust)
    assert_equal(found, model)
    assert agreement.largest_difference <= 1e-5
    tensors = {tensor.data_ptr(): tensor for tensor in found.state_dict().values()}  # a tied one is stored once
    assert sum(tensor.numel() for tensor in tensors.values()) == costs.parameters
    return costs, found


@pytest.mark.parametrize("name", some(UNIFORM))
def test_uniform(name, tmp_path):
    """The own class with narrower layers; where it computes the size of its heads, with heads that are zero."""
    model = pruned(name)
    costs, found = check(name, model, tmp_path / "out", "uniform")
    assert type(found).__name__ == costs.model_class
    assert costs.parameters_ratio < 1 or costs.added_parameters > 0
    if Block.ATTENTION in FAMILIES[name].blocks:  # heads that are zero are counted as what they are
        assert (costs.added_parameters > 0) == (costs.heads[0] > most_units(model) * per_unit(model))
    if Block.MLP in FAMILIES[name].blocks:
        assert costs.channels == (96, 96)


@pytest.mark.parametrize("name", PER_LAYER)  # the others below, with biases
def test_per_layer(name, tmp_path):
    costs, _ = check(name, pruned(name, skip_layers=(1,)), tmp_path / "out", "per-layer", trust_remote_code=True)
    assert costs.added_parameters == 0
    assert costs.heads[0] < costs.heads[1] or costs.channels[0] < costs.channels[1]


@slow
@pytest.mark.parametrize("name", FAMILIES)
def test_biases_of_flap_in_any_family(name, tmp_path):
    model = pruned(name, FLAP)
    costs, _ = check(name, model, tmp_path / "layers", "per-layer", trust_remote_code=True)
    assert costs.added_parameters == 0
    refused = pytest.raises(UserError, match="no stock class holds")
    with nullcontext() if name in BIASED else refused:
        check(name, model, tmp_path / "padded", "padded")


@pytest.mark.parametrize(("name", "implementation"), [("phi3", "eager"), ("llama_gqa", "sdpa")])
def test_a_per_layer_folder_is_a_model_like_any_other(name, implementation, tmp_path, in_stock_python):
    """In a process with transformers alone: attention may be switched, copies work, and stock models stay stock."""
    model = pruned(name, skip_layers=(1,))
    export_checkpoint(model, tmp_path / "out", layout="per-layer")
    tiny(name).save_pretrained(tmp_path / "dense")
    torch.save({"ids": ids(), "logits": logits(model, ids())}, tmp_path / "expected.pt")
    in_stock_python(f"""
import copy, torch
from transformers import AutoConfig, AutoModelForCausalLM
expected = torch.load({str(tmp_path / "expected.pt")!r})
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r}, trust_remote_code=True).eval()
model.set_attn_implementation({implementation!r})
with torch.no_grad():
    for one in (model, copy.deepcopy(model)):
        torch.testing.assert_close(one(expected["ids"]).logits, expected["logits"], rtol=0, atol=1e-5)
dense = AutoModelForCausalLM.from_pretrained({str(tmp_path / "dense")!r})
assert type(dense).__name__ == {type(model).__name__!r}
model.save_pretrained({str(tmp_path / "again")!r})
again = AutoModelForCausalLM.from_pretrained({str(tmp_path / "again")!r}, trust_remote_code=True).eval()
with torch.no_grad():
    torch.testing.assert_close(again(expected["ids"]).logits, expected["logits"], rtol=0, atol=1e-5)
fresh = AutoModelForCausalLM.from_config(again.config, trust_remote_code=True)
assert all(weight.abs().max() < 2 for weight in fresh.parameters())
""")


@pytest.mark.parametrize("layout", ["uniform", "padded", "per-layer"])
@pytest.mark.parametrize("name", ["llama_gqa", "qwen2"])
def test_single_query_heads_of_groups(name, layout, tmp_path):
    """Each that stays is written with its own key/value head: ordinary multi-head attention."""
    model = tiny(name)
    ratio, skipped = (0.4, ()) if layout == "uniform" else (0.3, (1,))
    method = WandaSP(attention_unit=AttentionUnit.QUERY_HEAD)
    prune_(model, method, statistics(name), pruning_ratio=ratio, skip_layers=skipped, round_to=16)
    costs, agreement = export_checkpoint(model, tmp_path / "out", layout=layout)
    assert agreement.largest_difference <= 1e-5 and costs.added_parameters > 0
    found = loaded(tmp_path / "out", trust_remote_code=layout == "per-layer")
    expected = masked_dense(tiny(name), kept_units(model), HEADS)
    for wanted in (logits(model, ids()), logits(expected, ids())):
        torch.testing.assert_close(logits(found, ids()), wanted, rtol=0, atol=1e-5)
    assert torch.equal(generated(found, ids()), generated(model, ids()))
    # five of eight query heads stay; a skipped layer keeps its four groups where layers may differ
    assert (costs.heads, costs.key_heads) == {
        "uniform": ((5, 5), (5, 5)),
        "padded": ((8, 8), (8, 8)),
        "per-layer": ((5, 8), (4, 5)),
    }[layout]


def test_what_own_keys_cost_is_told():
    model = tiny("llama_gqa")
    prune_(
        model,
        WandaSP(attention_unit=AttentionUnit.QUERY_HEAD),
        statistics("llama_gqa"),
        pruning_ratio=0.4,
        skip_layers=(),
        round_to=16,
    )
    uniform = compare_layouts(model)[0]
    keys_and_values = 2 * model.config.num_hidden_layers * 64 * 8
    assert uniform.added_parameters == (5 - 4) * keys_and_values
    assert compare_layouts(pruned("llama_gqa"))[0].added_parameters == 0


def test_a_single_key_head_stays_single(tmp_path):
    model = tiny("qwen3", num_key_value_heads=1)
    stats = calibrate(model, calibration_batches(), progress=False)
    prune_(model, WandaSP(), stats, pruning_ratio=0.4, skip_layers=(1,), round_to=16)
    assert PrunedSizes.of(model).key_heads == {}
    costs, _ = export_checkpoint(model, tmp_path / "out", layout="per-layer")
    assert costs.key_heads == (1, 1) and costs.added_parameters == 0
    found = loaded(tmp_path / "out", trust_remote_code=True)
    torch.testing.assert_close(logits(found, ids()), logits(model, ids()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["phi3", "glm", pytest.param("falcon_multi_query", marks=slow)])
def test_padding_goes_behind_each_role_of_a_fused_projection(name, tmp_path):
    model = pruned(name, skip_layers=(1,))
    costs, _ = check(name, model, tmp_path / "out", "padded")
    assert costs.heads == (8, 8) and costs.channels == (160, 160)


def test_no_language_model(tmp_path):
    model = AutoModel.from_config(tiny("llama").config)
    for export in (
        lambda: export_checkpoint(model, tmp_path / "out"),
        lambda: export_graph(model, tmp_path / "out", form="pt2"),
        lambda: compare_layouts(model),
    ):
        with pytest.raises(UserError, match="LlamaModel cannot be exported: only causal language models") as caught:
            export()
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


REFUSED_GRAPHS = {"gemma2": "soft-capped scores", "gpt_oss": "sinks", "qwen3_5_text": "--kv_cache false"}


@pytest.mark.parametrize("name", ["qwen3_5_text", *(pytest.param(n, marks=slow) for n in ("gemma2", "gpt_oss"))])
def test_what_no_graph_holds_is_refused_in_one_line(name, tmp_path):
    with pytest.raises(UserError, match=REFUSED_GRAPHS[name]) as caught:
        export_graph(pruned(name), tmp_path / "out", form="pt2")
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


@slow
def test_graphs(tmp_path):
    """Of fused projections, and of single tokens too, which is how one decodes."""
    static, model = (tiny("phi3", num_hidden_layers=2) for _ in range(2))
    stats = calibrate(static, calibration_batches(), progress=False)
    for one, method in ((static, WandaSP()), (model, ProbePruning())):
        prune_(one, method, stats, pruning_ratio=0.4, skip_layers=(), round_to=16)
    assert export_graph(static, tmp_path / "static", form="pt2").same_tokens > 0
    export_dynamic_graph(model, tmp_path / "dynamic", form="pt2", rows=4, tokens=24)
    inputs = json.loads((tmp_path / "dynamic" / "pruning.json").read_text())["graph"]["inputs"]
    assert inputs[2:4] == ["history.0.attention", "history.0.mlp"]


@pytest.mark.slow
def test_a_query_head_graph_keeps_what_it_runs_with(tmp_path):
    model = tiny("llama_gqa", num_hidden_layers=2)
    stats = calibrate(model, calibration_batches(), progress=False)
    method = WandaSP(attention_unit=AttentionUnit.QUERY_HEAD)
    prune_(model, method, stats, pruning_ratio=0.4, skip_layers=(), round_to=16)
    assert export_graph(model, tmp_path / "out", form="pt2").same_tokens > 0
    assert json.loads((tmp_path / "out" / "pruning.json").read_text())["graph"]["key_value_heads"] == [5, 5]


def test_the_class_of_a_model_is_still_what_it_was(tmp_path):
    """Loading a per-layer folder teaches transformers nothing about stock configs."""
    export_checkpoint(pruned("llama_gqa", skip_layers=(1,)), tmp_path / "out", layout="per-layer")
    assert type(AutoModelForCausalLM.from_config(tiny("llama_gqa").config)).__name__ == "LlamaForCausalLM"
