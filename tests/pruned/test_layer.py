"""A pruned layer is the dense layer with the dropped units zeroed."""

import pytest
import torch
from torch import nn

from pp_lightning import calibrate, kept_units, prune_
from pp_lightning.blocks import Block
from pp_lightning.families import blocks_of, shape_of
from pp_lightning.methods import FLAP, FullBatchProbing, ProbePruning, StaticPPsp, WandaSP
from tests.models import (
    GROUPED,
    HEADS,
    MLP_WIDTH,
    MODELS,
    PRUNED,
    SETTINGS,
    calibration_batches,
    choices,
    ids,
    logits,
    masked_dense,
    padded,
    pairs,
    plant,
    ragged,
    statistics,
    tiny,
)

METHODS = {
    "pp": ProbePruning,
    "pp_parallel": lambda: ProbePruning(probe_source="previous"),
    "pp_rank_by_input": lambda: ProbePruning(rank_by="input", row_ratio=0.5),
    "full_batch": FullBatchProbing,
    "ppsp": StaticPPsp,
    "wanda_sp": WandaSP,
    "flap_without_bias": lambda: FLAP(bias=False),
}


def default_units(name: str) -> int:
    """Attention units where none is asked for: groups where query heads share keys."""
    return shape_of(tiny(name).config).num_key_value_heads


def equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "method"), pairs(["llama_gqa", *MODELS], METHODS))
def test_equals_masked_dense(name, method):
    model = tiny(name)
    prune_(model, METHODS[method](), statistics(name), **SETTINGS)
    for seed in (50, 51):
        text = ids(seed=seed)
        found = logits(model, text)
        kept = kept_units(model)
        assert tuple(kept) == PRUNED
        if method != "flap_without_bias":  # whose counts differ from layer to layer
            heads = 2 if MODELS[name].grouped else 3
            assert all((len(k.attention), len(k.mlp)) == (heads, 64) for k in kept.values())
        equal(found, logits(masked_dense(tiny(name), kept, default_units(name)), text))


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("method", [ProbePruning, FullBatchProbing])
def test_single_query_heads_of_grouped_queries(name, method):
    dense, model = tiny(name), tiny(name)
    prune_(model, method(attention_unit="query_head"), statistics(name), **SETTINGS)
    text = ids(seed=50)
    found = logits(model, text)
    kept = kept_units(model)
    assert all(len(units.attention) == 3 for units in kept.values())  # an odd number: no union of whole groups
    equal(found, logits(masked_dense(dense, kept, HEADS), text))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_equals_masked_dense_at_the_real_tokens_of_ragged_rows(name, side):
    dense, model = tiny(name), tiny(name)
    prune_(model, ProbePruning(row_ratio=0.5), statistics(name), **SETTINGS)
    batch = ragged([24, 3, 17, 9, 12], side)
    real = batch["attention_mask"].bool()
    found = logits(model, batch["input_ids"], attention_mask=batch["attention_mask"])
    masked = masked_dense(dense, kept_units(model), default_units(name))
    expected = logits(masked, batch["input_ids"], attention_mask=batch["attention_mask"])
    equal(found[real], expected[real])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("bias", ["uniform", "global"])
def test_flap_equals_masked_dense_with_its_bias(name, bias):
    model, masked, stats = tiny(name), tiny(name), statistics(name)
    prune_(model, FLAP(uniform=bias == "uniform"), stats, **SETTINGS)
    kept = kept_units(model)
    add_flap_bias(masked, kept, stats, default_units(name))
    masked = masked_dense(masked, kept, default_units(name))
    equal(logits(model, ids(seed=50)), logits(masked, ids(seed=50)))


def add_flap_bias(model, kept, stats, num_units):
    """Put ``W E[x]`` of the removed channels on top of what bias the output matrices have, with loops."""
    for index, units in kept.items():
        parts = ((Block.ATTENTION, units.attention, num_units), (Block.MLP, units.mlp, MLP_WIDTH))
        for block, kept_here, number in parts:
            modules = blocks_of(model)[index, block]
            output = modules.projection(modules.output)
            width = output.in_features // number
            mean = stats.sums[index, block].values.sum(0) / stats.counts.sum()
            bias = torch.zeros(output.out_features)
            for channel in range(output.in_features):
                if channel // width not in kept_here.tolist():
                    bias += output.weight.detach()[:, channel] * mean[channel]
            assert bias.abs().max() > 1e-3
            own = 0.0 if output.bias is None else output.bias.detach()
            output.bias = nn.Parameter(own + bias)


@pytest.mark.parametrize(("name", "method"), pairs(MODELS, [ProbePruning, FullBatchProbing, StaticPPsp]))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_ratio_zero_is_the_stock_model(name, method, attention):
    stock, model = (tiny(name, attn_implementation=attention) for _ in range(2))
    prune_(model, method(), statistics(name), **{**SETTINGS, "pruning_ratio": 0.0})
    batch = padded(ids(), left=3)
    torch.testing.assert_close(logits(model, ids()), logits(stock, ids()))
    real = batch["attention_mask"].bool()
    found, expected = (logits(m, batch["input_ids"], attention_mask=batch["attention_mask"]) for m in (model, stock))
    torch.testing.assert_close(found[real], expected[real])


@pytest.mark.parametrize("name", ["llama", "llama_gqa", "opt"])
def test_eager_attention_gives_the_same_as_sdpa(name):
    batch = ragged([24, 3, 17, 9], "left")
    real = batch["attention_mask"].bool()
    found = {}
    for attention in ("sdpa", "eager"):
        model = tiny(name, attn_implementation=attention)
        prune_(model, ProbePruning(row_ratio=0.5), statistics(name), **SETTINGS)
        plain = logits(model, ids())
        out = logits(model, batch["input_ids"], attention_mask=batch["attention_mask"])
        found[attention] = (choices(kept_units(model)), plain, out[real])
    assert found["sdpa"][0] == found["eager"][0]
    equal(found["sdpa"][1], found["eager"][1])
    equal(found["sdpa"][2], found["eager"][2])


@pytest.mark.parametrize(
    ("name", "method"), pairs(["llama", "opt"], [ProbePruning, FullBatchProbing, StaticPPsp, WandaSP, FLAP])
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(name, method, dtype):
    found = {}
    for precision in (torch.float32, dtype):
        model, planted = plant(tiny(name))
        model = model.to(precision)
        stats = calibrate(model, calibration_batches(), progress=False)
        prune_(model, method(), stats, **SETTINGS)
        found[precision] = logits(model, ids()).float()
        if method is not FLAP:
            assert choices(kept_units(model)) == planted
    exact, half = found[torch.float32], found[dtype]
    assert torch.isfinite(half).all()
    # 8 bits of mantissa in bfloat16, 11 in float16, through five layers
    tolerance = {torch.bfloat16: 0.03, torch.float16: 0.004}[dtype]
    assert (half - exact).norm() / exact.norm() < tolerance
