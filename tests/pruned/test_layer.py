"""A pruned layer is the dense layer with the dropped units zeroed."""

import pytest
import torch

from pp_lightning import calibrate, kept_units, prune_
from pp_lightning.families import shape_of
from pp_lightning.methods import FLAP, FullBatchProbing, ProbePruning, StaticPPsp, WandaSP
from tests.models import (
    GROUPED,
    HEADS,
    MODELS,
    PRUNED,
    SETTINGS,
    calibration_batches,
    choices,
    close,
    ids,
    logits,
    masked_dense,
    padded,
    pairs,
    plant,
    pruned,
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


@pytest.mark.parametrize(("name", "method"), pairs(["llama_gqa", *MODELS], METHODS))
def test_equals_masked_dense(name, method):
    model = pruned(name, METHODS[method])
    for seed in (50, 51):
        text = ids(seed=seed)
        found = logits(model, text)
        kept = kept_units(model)
        assert tuple(kept) == PRUNED
        if method != "flap_without_bias":  # whose counts differ from layer to layer
            heads = 2 if MODELS[name].grouped else 3
            assert all((len(k.attention), len(k.mlp)) == (heads, 64) for k in kept.values())
        close(found, logits(masked_dense(tiny(name), kept, default_units(name)), text))


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("method", [ProbePruning, FullBatchProbing])
def test_single_query_heads_of_grouped_queries(name, method):
    dense, model = tiny(name), tiny(name)
    prune_(model, method(attention_unit="query_head"), statistics(name), **SETTINGS)
    text = ids(seed=50)
    found = logits(model, text)
    kept = kept_units(model)
    assert all(len(units.attention) == 3 for units in kept.values())  # an odd number: no union of whole groups
    close(found, logits(masked_dense(dense, kept, HEADS), text))


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
