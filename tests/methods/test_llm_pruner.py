import pytest
import torch

from pp_lightning import UserError, kept_units, prune_, taylor_importances, unprune_
from pp_lightning.blocks import Block
from pp_lightning.functional.members import Reduction
from pp_lightning.methods import LLMPruner
from tests.models import GROUPS, HEADS, MLP_WIDTH, MODELS, PRUNED, SETTINGS, ids, logits, masked_dense, tiny

BATCH = {"input_ids": ids(5, 16)}
REDUCE = {
    Reduction.SUM: lambda m: m.sum(0),
    Reduction.MEAN: lambda m: m.mean(0),
    Reduction.MAX: lambda m: m.max(0).values,
    Reduction.PROD: lambda m: m.prod(0),
}


def importances(name, taylor="param_first"):
    return taylor_importances(tiny(name), [BATCH], LLMPruner(taylor).taylor, progress=False)


def naive_scores(members, units, reduction, head_size):
    """Per unit and offset inside a head, member by member, with loops."""
    scores = []
    for unit in range(units):
        rows = []
        for vector in members.values():
            width = len(vector) // units
            own = vector[unit * width : (unit + 1) * width]
            rows.append([float(own[offset::head_size].sum()) for offset in range(head_size)])
        scores.append(float(REDUCE[reduction](torch.tensor(rows)).sum()))
    return scores


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("reduction", Reduction)
def test_keeps_the_best_of_each_block(name, reduction):
    model, calibration_data = tiny(name), importances(name)
    prune_(model, LLMPruner(reduction=reduction.value), calibration_data, **SETTINGS)
    units = GROUPS if MODELS[name].grouped else HEADS
    head_size = len(calibration_data.members[2, Block.ATTENTION]["key"]) // units
    keep = 2 if MODELS[name].grouped else 3
    for layer in PRUNED:
        kept = kept_units(model)[layer]
        heads = naive_scores(calibration_data.members[layer, Block.ATTENTION], units, reduction, head_size)
        channels = naive_scores(calibration_data.members[layer, Block.MLP], MLP_WIDTH, reduction, 1)
        assert kept.attention.tolist() == sorted(sorted(range(units), key=lambda u: -heads[u])[:keep])
        assert kept.mlp.tolist() == sorted(sorted(range(MLP_WIDTH), key=lambda u: -channels[u])[:64])


@pytest.mark.parametrize("name", ["llama", "llama_gqa", "opt"])
def test_the_pruned_model_is_the_masked_one_and_comes_back(name):
    model, text = tiny(name), ids(2, 20, seed=9)
    prune_(model, LLMPruner(), importances(name), **SETTINGS)
    expected = logits(masked_dense(tiny(name), kept_units(model), GROUPS if MODELS[name].grouped else HEADS), text)
    torch.testing.assert_close(logits(model, text), expected)
    assert not torch.allclose(logits(tiny(name), text), expected, atol=1e-2)
    unprune_(model)
    assert torch.equal(logits(model, text), logits(tiny(name), text))


def test_variants_choose_differently():
    found = set()
    for taylor in ("vectorize", "param_first", "param_second", "param_mix"):
        model = tiny("llama")
        prune_(model, LLMPruner(taylor), importances("llama", taylor), **SETTINGS)
        found.add(tuple(kept_units(model)[3].mlp.tolist()))
    assert len(found) >= 3  # param_mix may agree with param_first where gradients are small


def test_a_unit_that_the_loss_does_not_feel_goes_first():
    model = tiny("llama")
    silent = [5, 77]
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[:, silent] = 0.0
    calibration_data = taylor_importances(model, [BATCH], progress=False)
    prune_(
        model, LLMPruner(blocks=("mlp",)), calibration_data, pruning_ratio=0.02, skip_layers=(0, 1, 2, 4), round_to=1
    )
    kept = kept_units(model)[3].mlp.tolist()
    assert len(kept) == MLP_WIDTH - 16
    assert not set(silent) & set(kept)


def test_global_ranking_pools_raw_scores():
    """The smallest scores of all blocks go, whatever a unit costs; a head is a sum of many weights."""
    model, calibration_data = tiny("llama"), importances("llama")
    prune_(model, LLMPruner(global_ranking=True), calibration_data, **{**SETTINGS, "round_to": 1})
    pooled = []
    for layer in PRUNED:
        for kind, units, size in ((Block.ATTENTION, HEADS, 8), (Block.MLP, MLP_WIDTH, 1)):
            scores = naive_scores(calibration_data.members[layer, kind], units, Reduction.SUM, size)
            pooled += [(score, layer, kind, unit) for unit, score in enumerate(scores)]
    removed = sorted(pooled)[: int(0.67 * len(pooled))]
    for layer in PRUNED:
        kept = kept_units(model)[layer]
        for kind, found, number in ((Block.ATTENTION, kept.attention, HEADS), (Block.MLP, kept.mlp, MLP_WIDTH)):
            gone = {unit for _, at, of, unit in removed if (at, of) == (layer, kind)}
            assert found.tolist() == [unit for unit in range(number) if unit not in gone]
    assert len({len(kept_units(model)[layer].mlp) for layer in PRUNED}) > 1


def test_ranges_of_layers():
    model = tiny("llama")
    method = LLMPruner(attention_layers=(3, 5), mlp_layers=(2, 3))
    prune_(model, method, importances("llama"), **SETTINGS)
    kept = kept_units(model)
    assert [len(kept[layer].attention) for layer in PRUNED] == [8, 3, 3]
    assert [len(kept[layer].mlp) for layer in PRUNED] == [64, 160, 160]


def test_all_zero_scores_are_an_error():
    calibration_data, model = importances("llama"), tiny("llama")
    for vector in calibration_data.members[4, Block.MLP].values():
        vector.zero_()
    with pytest.raises(
        UserError, match="scores of the mlp block of layer 4 are all zero, any choice would be arbitrary"
    ):
        prune_(model, LLMPruner(), calibration_data, **SETTINGS)
    assert model.model.layers[2].mlp.up_proj.out_features == MLP_WIDTH


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"samples": 0}, "samples must be at least 1"),
        ({"window": 1}, "window at least 2"),
        ({"attention_layers": (5, 5)}, "attention_layers must be a first layer and a later one"),
        ({"mlp_layers": (-1, 2)}, "mlp_layers must be"),
    ],
)
def test_impossible_settings(setting, message):
    with pytest.raises(UserError, match=message):
        LLMPruner(**setting)


def test_single_query_heads_are_refused():
    with pytest.raises(UserError, match="attention_unit=kv_group"):
        prune_(tiny("llama_gqa"), LLMPruner(attention_unit="query_head"), importances("llama_gqa"), **SETTINGS)
