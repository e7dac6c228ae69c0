"""Counts that devices and engines can share: heads alike in every layer, heads and channels in multiples."""

import pytest
import torch

from pp_lightning import LeastSquares, calibrate, prune_, taylor_importances
from pp_lightning.blocks import Block
from pp_lightning.errors import UserError
from pp_lightning.families import shape_of
from pp_lightning.flops import pruned_flops
from pp_lightning.methods import FLAP, LLMPruner, StaticBest, StaticPPsp, WandaSP
from pp_lightning.pruning import pruning_of
from tests.models import CALIBRATED, LAYERS, ROWS, calibration_batches, statistics, tiny

ASKED = {"pruning_ratio": 0.4, "skip_layers": (0, 1), "round_to": 8}


def importances():
    return taylor_importances(tiny("llama"), calibration_batches(2), progress=False)


CHOICES = {
    "wanda_sp": (WandaSP(), {}),
    "wanda_sp, global": (WandaSP(), {"allocation": "global"}),
    "static_ppsp, outliers": (StaticPPsp(), {"allocation": "outliers"}),
    "flap": (FLAP(), {}),
    "llm_pruner": (LLMPruner(global_ranking=True), {}),
    "static_best": (StaticBest(), {}),
    "static_best, searched": (StaticBest(allocation="searched"), {}),
}


def kept(name, **settings):
    """Units that stay in attention and in MLPs, by layer."""
    method, asked = CHOICES[name]
    model, batches = tiny("llama"), calibration_batches(4)
    calibration_data = importances() if name == "llm_pruner" else statistics("llama")
    if name == "static_ppsp, outliers":
        with torch.no_grad():  # random models have none
            model.model.layers[3].self_attn.o_proj.weight[:, :4] *= 10
            model.model.layers[3].mlp.down_proj.weight[:, :4] *= 10
        calibration_data = calibrate(model, batches, progress=False)
    if method.updates:
        calibration_data, asked = (
            calibrate(model, batches, progress=False),
            {**asked, "update": LeastSquares(batches, passes=40)},
        )
    prune_(model, method, calibration_data, **{**ASKED, **asked, **settings})
    keep = pruning_of(model).keep
    found = [[keep.get((layer, block), 0) for layer in range(LAYERS)] for block in (Block.ATTENTION, Block.MLP)]
    return model, *found


@pytest.mark.parametrize("name", CHOICES)
def test_heads_are_alike_and_mlps_differ(name):
    _, heads, channels = kept(name, uniform_heads=True)
    assert heads == [5] * LAYERS  # int(0.4 * 8) = 3 go
    assert (len(set(channels)) > 1) == (name != "wanda_sp") and 0 not in channels
    _, free, _ = kept(name)
    assert len(set(free)) > 1 or name == "llm_pruner"  # without it they differ; this one takes no head here


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("devices", [2, 4])
def test_heads_and_channels_divide_among_devices(name, devices):
    _, heads, channels = kept(name, tensor_parallel=devices, round_to=2)
    assert all(number % devices == 0 for number in heads + channels)
    assert any(0 < number < 160 for number in channels)
    assert any(0 < number < 8 for number in heads) or name == "llm_pruner"  # which takes channels alone here


def test_without_it_they_do_not():
    _, heads, channels = kept("flap", round_to=1)
    assert any(number % 2 for number in heads) and any(number % 2 for number in channels)


def test_a_ranking_of_mlps_alone_saves_what_uniform_counts_save():
    flops = {}
    for allocation in ("uniform", "global"):
        model, _, _ = kept("wanda_sp", uniform_heads=True, allocation=allocation)
        flops[allocation] = sum(
            pruned_flops(shape_of(model.config), pruning_of(model), ROWS, CALIBRATED).blocks.values()
        )
    step = 8 * 3 * 64 * 2 * ROWS * CALIBRATED  # channels at a time, their weights twice a token
    assert 0 <= flops["global"] - flops["uniform"] < step


def test_both_together_and_multiples_of_the_mlp():
    _, heads, channels = kept("flap", uniform_heads=True, tensor_parallel=4, round_to=32)
    assert heads == [8] * LAYERS or heads == [4] * LAYERS
    assert all(number % 32 == 0 for number in channels) and len(set(channels)) > 1


def test_key_value_heads_that_devices_cannot_share():
    model = tiny("llama_gqa")
    groups = model.config.num_key_value_heads
    with pytest.raises(UserError, match=f"the model's {groups} key/value heads|keeps all {groups}"):
        prune_(model, WandaSP(), statistics("llama_gqa"), **ASKED, tensor_parallel=8)


def test_layers_that_are_left_out_are_not_alike():
    model = tiny("llama")
    with pytest.raises(UserError, match="leave out attention_layers"):
        prune_(model, LLMPruner(attention_layers=(1, 3)), importances(), **ASKED, uniform_heads=True)
