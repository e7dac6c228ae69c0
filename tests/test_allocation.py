import pytest
import torch

from pp_lightning import UserError, calibrate, kept_units, prune_, unprune_
from pp_lightning.allocation import unit_flops
from pp_lightning.blocks import Block
from pp_lightning.families import shape_of
from pp_lightning.flops import attention_flops, mlp_flops, pruned_flops
from pp_lightning.methods import FLAP, FullBatchProbing, ProbePruning, StaticPPsp
from pp_lightning.plan import Amounts, make_plan
from pp_lightning.pruning import pruning_of
from tests.models import (
    CALIBRATED,
    LAYERS,
    MODELS,
    ROWS,
    SETTINGS,
    calibration_batches,
    ids,
    logits,
    output_weights,
    statistics,
    tiny,
)


def counts(name, method, **settings):
    model = tiny(name)
    prune_(model, method, statistics(name), **{**SETTINGS, **settings})
    return model, pruning_of(model).keep


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("unit", ["query_head", "kv_group"])
def test_flops_of_a_unit_are_those_that_the_block_counts(name, unit):
    shape = shape_of(tiny(name).config)
    attention, mlp = make_plan(shape, ProbePruning(attention_unit=unit), Amounts(**SETTINGS)).blocks
    assert unit_flops(mlp, 24) * 24 == mlp_flops(shape, 1, 24, 7) - mlp_flops(shape, 1, 24, 6)
    if not shape.grouped:
        heads, keys = (1, 1)
    elif unit == "query_head":
        heads, keys = (1, 0)
    else:
        heads, keys = (shape.num_heads // shape.num_key_value_heads, 1)
    more, less = attention_flops(shape, 1, 24, 2 * heads, 2 * keys), attention_flops(shape, 1, 24, heads, keys)
    assert unit_flops(attention, 24) * 24 == more - less


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ratio", [0.2, 0.4])
def test_saves_what_uniform_ratios_save_and_skips_no_layer(name, ratio):
    flops = {}
    for allocation in ("uniform", "global"):
        model, keep = counts(name, ProbePruning(), allocation=allocation, pruning_ratio=ratio)
        shape = shape_of(model.config)
        flops[allocation] = sum(pruned_flops(shape, pruning_of(model), ROWS, CALIBRATED).blocks.values())
    assert {layer for layer, _ in keep} == set(range(LAYERS))
    largest_unit = max(unit_flops(b, CALIBRATED) * b.round_to for b in pruning_of(model).plan.blocks)
    assert 0 <= flops["global"] - flops["uniform"] < largest_unit * ROWS * CALIBRATED
    assert len({keep[layer, Block.MLP] for layer in range(LAYERS)}) > 1  # not uniform in disguise


def test_a_layer_that_matters_little_gives_more():
    model = tiny("llama")
    with torch.no_grad():
        for weight in output_weights(model, 0):
            weight.mul_(0.001)
    stats = calibrate(model, calibration_batches(), progress=False)
    prune_(model, ProbePruning(), stats, **SETTINGS, allocation="global", floor=0.25)
    keep = pruning_of(model).keep
    assert (keep[0, Block.ATTENTION], keep[0, Block.MLP]) == (2, 48)  # the floor: a quarter, rounded up
    assert sum(keep[layer, Block.MLP] for layer in range(1, LAYERS)) / (LAYERS - 1) > 48


def test_floor():
    _, low = counts("llama", ProbePruning(), allocation="global", floor=0.0)
    _, high = counts("llama", ProbePruning(), allocation="global", floor=0.5)
    assert all(keep >= (4 if block is Block.ATTENTION else 80) for (_, block), keep in high.items())
    assert low != high


def test_by_default_attention_keeps_more_of_itself_than_mlps():
    keeps = {}
    for ratio in (0.4, 0.75):
        for floor in (None, 0.25):
            model = tiny("llama")
            with torch.no_grad():
                for weight in output_weights(model, 0):
                    weight.mul_(0.001)  # a layer that goes down to its floor
            cheap = calibrate(model, calibration_batches(), progress=False)
            settings = {**SETTINGS, "pruning_ratio": ratio, "skip_layers": ()}
            prune_(model, ProbePruning(), cheap, **settings, allocation="global", floor=floor)
            keeps[ratio, floor] = pruning_of(model).keep
    assert (keeps[0.4, None][0, Block.ATTENTION], keeps[0.4, None][0, Block.MLP]) == (3, 48)  # ceil(0.35 * 8)
    assert keeps[0.4, 0.25][0, Block.ATTENTION] == 2
    assert keeps[0.75, None] == keeps[0.75, 0.25]  # three heads a layer would leave too little to remove


def test_kept_units_are_as_many_as_counted():
    model, keep = counts("llama", ProbePruning.best())
    logits(model, ids())
    for layer, units in kept_units(model).items():
        assert len(units.attention) == keep[layer, Block.ATTENTION]
        assert len(units.mlp) == keep[layer, Block.MLP]


def test_blocks_that_are_not_pruned_stay_whole():
    _, keep = counts("llama", ProbePruning(blocks=("mlp",)), allocation="global")
    assert all(number == 8 for (_, block), number in keep.items() if block is Block.ATTENTION)
    assert any(number < 160 for (_, block), number in keep.items() if block is Block.MLP)


def test_the_argument_overrules_the_method():
    _, by_method = counts("llama", ProbePruning(allocation="global"))
    _, by_argument = counts("llama", ProbePruning(), allocation="global")
    _, overruled = counts("llama", ProbePruning(allocation="global"), allocation="uniform")
    assert by_method == by_argument != overruled


def test_full_batch_probing_and_static_methods_allocate_too():
    model, keep = counts("llama", FullBatchProbing(), allocation="global")
    logits(model, ids())
    assert len(set(keep.values())) > 2
    model, static = counts("llama", StaticPPsp(), allocation="global")
    assert static == keep
    assert torch.isfinite(logits(model, ids())).all()
    unprune_(model)
    assert torch.equal(logits(model, ids()), logits(tiny("llama"), ids()))


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (
            ProbePruning(),
            {"allocation": "layerwise"},
            "allocation must be uniform, global or outliers, not 'layerwise'",
        ),
        (ProbePruning(), {"allocation": "global", "floor": 1.5}, "floor is the fraction"),
        (ProbePruning(), {"allocation": "global", "floor": 0.9}, "lower floor or pruning_ratio"),
        (FLAP(), {"allocation": "global"}, "FLAP spreads units over the layers itself: leave allocation out"),
    ],
)
def test_mistakes_are_one_line_and_change_nothing(method, settings, message):
    model = tiny("llama")
    with pytest.raises(UserError, match=message):
        prune_(model, method, statistics("llama"), **{**SETTINGS, **settings})
    assert torch.equal(logits(model, ids()), logits(tiny("llama"), ids()))


def test_needs_statistics():
    with pytest.raises(UserError, match="needs calibration statistics"):
        prune_(tiny("llama"), FullBatchProbing(), **SETTINGS, allocation="global")


def test_statistics_must_cover_the_layers_that_uniform_ratios_skip():
    stats = statistics("llama")
    del stats.sums[0, Block.MLP]
    with pytest.raises(UserError, match="do not cover the mlp block of layer 0"):
        prune_(tiny("llama"), ProbePruning(), stats, **SETTINGS, allocation="global")
