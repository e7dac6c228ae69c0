"""Analytic FLOPs against the published table and against torch's own counter."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, OPTConfig

from pp_lightning import prune_, unprune_
from pp_lightning.blocks import Block
from pp_lightning.families import shape_of
from pp_lightning.flops import dense_flops, probe_flops, pruned_flops
from pp_lightning.methods import FullBatchProbing, ProbePruning, WandaSP
from pp_lightning.pruning import pruning_of
from tests.models import MODELS, SETTINGS, ids, statistics, tiny

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


def counted(model, input_ids, use_cache=False):
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(input_ids=input_ids, use_cache=use_cache)
    # Angles of the rotary embedding: a product in some versions of transformers, and no arithmetic of the model.
    angles = [sum(ops.values()) for path, ops in counter.get_flop_counts().items() if path.endswith("rotary_emb")]
    return counter.get_total_flops() - sum(angles)


@pytest.mark.parametrize("name", MODELS)
def test_dense_model_agrees_with_the_counter(name):
    model = tiny(name, attn_implementation="eager")
    text = ids(ROWS, TOKENS)
    assert counted(model, text) == dense_flops(shape_of(model.config), ROWS, TOKENS).model


def restoring(attention_unit):
    return ProbePruning(compensation="probe", rank_by="random", allocation="global", attention_unit=attention_unit)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("unit", [None, "query_head"])
@pytest.mark.parametrize("method", [ProbePruning, FullBatchProbing, WandaSP, restoring])
def test_pruned_model_agrees_with_the_counter(name, unit, method):
    model = tiny(name, attn_implementation="eager")
    shape = shape_of(model.config)
    if method is WandaSP and unit == "query_head" and shape.grouped:
        pytest.skip("static methods remove whole groups")

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
