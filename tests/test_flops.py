"""Analytic FLOPs against the published table and against torch's own counter."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig

from pp_lightning import UserError, calibrate, prune_, unprune_
from pp_lightning.blocks import Block
from pp_lightning.families import Recipe, shape_of, shape_of_model
from pp_lightning.flops import continued_flops, dense_flops, probe_flops, pruned_flops
from pp_lightning.methods import FullBatchProbing, ProbePruning, WandaSP
from pp_lightning.pruning import pruning_of
from tests.models import FAMILIES, MODELS, SETTINGS, calibration_batches, config, families, ids, pairs, statistics, tiny

PUBLISHED = {
    "llama-2-7b": LlamaConfig(),
    "llama-2-13b": LlamaConfig(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=40
    ),
    "llama-3-8b": LlamaConfig(vocab_size=128256, intermediate_size=14336, num_key_value_heads=8),
    "opt-13b": OPTConfig(hidden_size=5120, ffn_dim=20480, num_hidden_layers=40, num_attention_heads=40),
}
ROWS, TOKENS = 3, 24


@pytest.mark.parametrize(
    ("name", "percent"), [("llama-2-7b", 1.56), ("llama-2-13b", 1.59), ("llama-3-8b", 1.47), ("opt-13b", 1.34)]
)
def test_probe_share_of_the_default_probe(name, percent):
    shape = shape_of(PUBLISHED[name])
    rows, tokens = ProbePruning().probe_sizes(20, 1024)
    probe = sum(probe_flops(shape, block, rows, tokens) for block in Block) * (shape.num_layers - 3)
    assert round(100 * probe / dense_flops(shape, 20, 1024).layers, 2) == percent


def counted(model, input_ids, use_cache=False, cache=None):
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(input_ids=input_ids, use_cache=use_cache, past_key_values=cache)
    # Angles of the rotary embedding: a product in some versions of transformers, and no arithmetic of the model.
    angles = [sum(ops.values()) for path, ops in counter.get_flop_counts().items() if path.endswith("rotary_emb")]
    return counter.get_total_flops() - sum(angles)


def countable(name):
    """A model whose every product the counter sees: all of attention, and experts by plain products."""
    model = tiny(name, attn_implementation="eager")
    model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize("name", families())
def test_dense_model_agrees_with_the_counter(name):
    model, shape = countable(name), shape_of(tiny(name).config)
    text = ids(ROWS, TOKENS)
    expected = dense_flops(shape, ROWS, TOKENS)
    assert counted(model, text) == expected.model
    assert (expected.other > 0) == any(
        part in name for part in ("expert", "moe", "mixtral", "gpt_oss", "qwen3_", "diff", "deep")
    )


WINDOWED = [name for name in FAMILIES if getattr(config(name), "sliding_window", None)]


@pytest.mark.parametrize("name", families(names=[name for name in FAMILIES if name not in WINDOWED]))
def test_decoding_agrees_with_the_counter(name):
    model, text = countable(name), ids(ROWS, 12)
    shape, blocks = shape_of(model.config), FAMILIES[name].blocks
    for method in (None, FullBatchProbing(blocks=blocks)):
        if method is not None:
            prune_(model, method, **SETTINGS | {"skip_layers": (0,)})
        with torch.no_grad():
            cache = model(input_ids=text, use_cache=True).past_key_values
        pruning = None if method is None else pruning_of(model)
        assert (
            counted(model, text[:, :1], use_cache=True, cache=cache) == continued_flops(shape, pruning, ROWS, 12).model
        )


@pytest.mark.parametrize("name", families())
def test_pruned_families_agree_with_the_counter(name):
    model, row = countable(name), FAMILIES[name]
    shape, text = shape_of(model.config), ids(ROWS, TOKENS)
    for method in (ProbePruning(blocks=row.blocks), WandaSP(blocks=row.blocks)):
        prune_(model, method, statistics(name), **SETTINGS | {"skip_layers": (0,)})
        expected, dense = pruned_flops(shape, pruning_of(model), ROWS, TOKENS), dense_flops(shape, ROWS, TOKENS)
        assert counted(model, text) == expected.model
        assert expected.other == dense.other
        if isinstance(method, WandaSP):
            assert expected.model < dense.model
        unprune_(model)


@pytest.mark.parametrize("width", [24, 96])
def test_embeddings_of_another_width_agree_with_the_counter(width):
    """OPT brings them to the width of its layers and back."""
    model = tiny("opt", attn_implementation="eager", word_embed_proj_dim=width)
    shape, text = shape_of(model.config), ids(ROWS, TOKENS)
    assert counted(model, text) == dense_flops(shape, ROWS, TOKENS).model
    same = dense_flops(shape_of(tiny("opt").config), ROWS, TOKENS)
    assert dense_flops(shape, ROWS, TOKENS).layers == same.layers
    stats = calibrate(model, calibration_batches(), progress=False)
    prune_(model, ProbePruning(), stats, **SETTINGS)
    assert counted(model, text) == pruned_flops(shape, pruning_of(model), ROWS, TOKENS).model
    with torch.no_grad():
        cache = model(input_ids=text[:, :12], use_cache=True).past_key_values
    decoding = continued_flops(shape, pruning_of(model), ROWS, 12).model
    assert counted(model, text[:, :1], use_cache=True, cache=cache) == decoding


def restoring(attention_unit):
    return ProbePruning(compensation="probe", rank_by="random", allocation="global", attention_unit=attention_unit)


@pytest.mark.parametrize(
    ("name", "method"), pairs(["llama_gqa", *MODELS], [ProbePruning, FullBatchProbing, WandaSP, restoring])
)
@pytest.mark.parametrize("unit", [None, "query_head"])
def test_pruned_model_agrees_with_the_counter(name, method, unit):
    model = tiny(name, attn_implementation="eager")
    shape = shape_of(model.config)
    prune_(model, method(attention_unit=unit), statistics(name), **SETTINGS)
    text = ids(ROWS, TOKENS)
    expected = pruned_flops(shape, pruning_of(model), ROWS, TOKENS)
    assert counted(model, text) == expected.model
    assert (expected.probe > 0) == (method is not WandaSP)
    unprune_(model)
    assert counted(model, text) == dense_flops(shape, ROWS, TOKENS).model


def test_counts_need_no_weights():
    assert dense_flops(shape_of(PUBLISHED["llama-2-7b"]), 1, 1).vocabulary == 2 * 4096 * 32000


@pytest.mark.parametrize("name", ["llama_gqa", "opt"])
@pytest.mark.parametrize("method", [ProbePruning, FullBatchProbing])
def test_prompts_of_a_model_that_decodes(name, method):
    """One row shares a projection with its probe, unless slices are wanted for decoding anyway."""
    model = tiny(name, attn_implementation="eager")
    prune_(model, method(), statistics(name), **{**SETTINGS, "pruning_ratio": 0.2})
    shape, pruning, text = shape_of(model.config), pruning_of(model), ids(1, TOKENS)
    first, later = (pruned_flops(shape, pruning, 1, TOKENS, sliced_anyway=wanted).model for wanted in (False, True))
    assert (first < later) == (method is ProbePruning), "a probe of the whole batch always shares"
    assert counted(model, text, use_cache=True) == first
    with torch.no_grad():
        cache = model(input_ids=text, use_cache=True).past_key_values
        model(input_ids=ids(1, 1), past_key_values=cache, use_cache=True)
    assert counted(model, text, use_cache=True) == later
    assert counted(model, text) == first


def test_layers_that_follow_the_data_are_refused_in_one_line():
    class Follows(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.model.layers[0].mlp.register_forward_pre_hook(lambda mlp, given: bool(given[0].sum() > 0) and None)

    config = tiny("llama").config
    shape = dataclasses.replace(shape_of(config), unknown=Recipe.of(config, Follows))
    with pytest.raises(UserError, match=r"^the FLOPs of llama cannot be counted: .* depends on the data$"):
        dense_flops(shape, 1, 4)


def test_a_model_that_is_not_described_is_counted():
    model = tiny("llama_gqa")
    model.config.model_type = "something_new"
    shape = shape_of_model(model)
    assert shape.unknown is not None
    assert dense_flops(shape, 2, 8) == dense_flops(shape_of(tiny("llama_gqa").config), 2, 8)
