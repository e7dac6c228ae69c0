import math

import pytest

from pp_lightning import UserError, kept_units, prune_
from pp_lightning.blocks import Block
from pp_lightning.methods import LLMPruner, LoRAPrune
from pp_lightning.recovery import lora_importances
from tests.models import GROUPS, HEADS, MLP_WIDTH, MODELS, PRUNED, SETTINGS, ids, tiny

BATCHES = [{"input_ids": ids(2, 16, seed)} for seed in range(3)]


@pytest.mark.parametrize("name", ["llama", "llama_gqa", "opt"])
def test_keeps_the_best_of_each_block(name):
    model = tiny(name)
    calibration_data = lora_importances(model, BATCHES, progress=False)
    prune_(model, LoRAPrune(), calibration_data, **SETTINGS)
    grouped = MODELS[name].grouped
    for layer in PRUNED:
        kept = kept_units(model)[layer]
        for kind, found, units, keep in (
            (Block.ATTENTION, kept.attention, GROUPS if grouped else HEADS, 2 if grouped else 3),
            (Block.MLP, kept.mlp, MLP_WIDTH, 64),
        ):
            scores = [0.0] * units
            for vector in calibration_data.members[layer, kind].values():
                width = len(vector) // units
                sums = [float(vector[u * width : (u + 1) * width].sum()) for u in range(units)]
                length = math.sqrt(sum(s * s for s in sums))
                scores = [score + s / (length + 1e-8) for score, s in zip(scores, sums, strict=True)]
            assert found.tolist() == sorted(sorted(range(units), key=lambda u, s=scores: -s[u])[:keep])


def test_all_zero_scores_are_an_error():
    model = tiny("llama")
    calibration_data = lora_importances(model, BATCHES, progress=False)
    for vector in calibration_data.members[4, Block.ATTENTION].values():
        vector.zero_()
    with pytest.raises(UserError, match="scores of the attention block of layer 4 are all zero"):
        prune_(model, LoRAPrune(), calibration_data, **SETTINGS)


def test_not_a_number_is_an_error():
    model = tiny("llama")
    calibration_data = lora_importances(model, BATCHES, progress=False)
    calibration_data.members[3, Block.MLP]["up"][7] = float("nan")
    with pytest.raises(UserError, match="scores of the mlp block of layer 3 are not finite"):
        prune_(model, LoRAPrune(), calibration_data, **SETTINGS)


def test_taylor_importances_are_another_kind():
    model = tiny("llama")
    calibration_data = lora_importances(model, BATCHES, progress=False)
    with pytest.raises(UserError, match="are lora, but the method asks for param_first"):
        prune_(model, LLMPruner(), calibration_data, **SETTINGS)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"every": 0}, "every must be at least 1"),
        ({"rank": 0}, "rank"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"warmup": 0.5, "cooldown": 0.5}, "leave steps in between"),
        ({"cooldown": -0.1}, "warmup and cooldown"),
    ],
)
def test_impossible_settings(setting, message):
    with pytest.raises(UserError, match=message):
        LoRAPrune(**setting)
