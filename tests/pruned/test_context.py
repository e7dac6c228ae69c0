"""Padding and positions."""

import pytest
import torch

from pp_lightning import UserError, calibrate, kept_units, prune_
from pp_lightning.methods import FullBatchProbing, ProbePruning
from tests.models import (
    CALIBRATED,
    MODELS,
    PRUNED,
    SETTINGS,
    calibration_batches,
    choices,
    histories,
    ids,
    logits,
    padded,
    pairs,
    pruned,
    ragged,
    tiny,
)
from tests.recording import RecordingProbePruning

METHODS = {
    "pp": lambda: ProbePruning(row_ratio=0.3),
    "pp_few_tokens": lambda: ProbePruning(token_ratio=0.2),
    "pp_fixed_fusion": lambda: ProbePruning(fusion_weight=0.3),
    "pp_parallel": lambda: ProbePruning(probe_source="previous", momentum=0.5),
    "pp_rank_by_input": lambda: ProbePruning(rank_by="input"),
    "full_batch": FullBatchProbing,
}


def position_ids(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


def run(model, batch, explicit=False):
    mask = batch["attention_mask"]
    extra = {"position_ids": position_ids(mask)} if explicit else {}
    return logits(model, batch["input_ids"], attention_mask=mask, **extra)


def assert_equal_histories(found, expected):
    assert found.keys() == expected.keys()
    for key, history in expected.items():
        torch.testing.assert_close(found[key], history, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *(("opt", method) for method in METHODS),
        *((name, method) for name in MODELS if name != "opt" for method in ("pp", "full_batch")),
    ],
)
@pytest.mark.parametrize(("left", "right", "explicit"), [(6, 0, False), (2, 3, True)])
def test_padding_changes_nothing(name, method, left, right, explicit):
    plain, wide = pruned(name, METHODS[method]), pruned(name, METHODS[method])
    for seed in (60, 61):  # the second batch sees the history that the first one left
        text = ids(5, 22, seed)
        expected = logits(plain, text)
        found = run(wide, padded(text, left, right), explicit)
        assert choices(kept_units(wide)) == choices(kept_units(plain))
        torch.testing.assert_close(found[:, left : left + 22], expected, rtol=1e-5, atol=1e-5)
        assert_equal_histories(histories(wide), histories(plain))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("explicit", [False, True], ids=["", "position_ids"])
def test_full_batch_probing_does_not_see_the_side_of_the_padding(name, explicit):
    found = {}
    for side in ("left", "right"):
        batch = ragged([24, 3, 17, 9, 12], side)
        model = pruned(name, FullBatchProbing)
        out = run(model, batch, explicit)
        found[side] = (choices(kept_units(model)), out[batch["attention_mask"].bool()])
    assert found["left"][0] == found["right"][0]
    torch.testing.assert_close(found["left"][1], found["right"][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama_gqa", "opt"])
def test_history_does_not_see_the_side_of_the_padding(name):
    """With all units kept in attention, and the same choice in the MLP, the history moves the same."""
    found = {}
    for side in ("left", "right"):
        batch = ragged([24, 3, 17, 9, 12], side)
        # fusion_weight 0: the choice depends on the history at the selected positions, here all of them
        model = pruned(name, lambda: ProbePruning(1.0, 1.0, fusion_weight=0.0))
        run(model, batch)
        found[side] = (choices(kept_units(model)), histories(model))
    assert found["left"][0] == found["right"][0]
    assert_equal_histories(found["left"][1], found["right"][1])


@pytest.mark.parametrize(("name", "method"), pairs(["llama", "qwen2", "opt"], METHODS))
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_the_pads_hold_does_not_matter(name, method, side):
    found = []
    for pad in (5, 77):
        batch = ragged([24, 3, 17, 9, 12], side)
        real = batch["attention_mask"].bool()
        batch["input_ids"][~real] = pad
        model = pruned(name, METHODS[method])
        out = run(model, batch)
        found.append((choices(kept_units(model)), out[real], histories(model)))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-5)
    assert_equal_histories(found[0][2], found[1][2])


@pytest.mark.parametrize(("name", "method"), pairs(["llama", "opt"], METHODS))
def test_rows_of_padding_alone_change_nothing(name, method):
    plain, more = pruned(name, METHODS[method]), pruned(name, METHODS[method])
    text = ids(5, 22, 60)
    expected = logits(plain, text)
    batch = padded(text)
    empty = torch.full((2, 22), 5)
    batch = {
        "input_ids": torch.cat([empty, batch["input_ids"], empty]),
        "attention_mask": torch.cat([torch.zeros_like(empty), batch["attention_mask"], torch.zeros_like(empty)]),
    }
    found = run(more, batch)
    assert choices(kept_units(more)) == choices(kept_units(plain))
    torch.testing.assert_close(found[2:-2], expected, rtol=1e-5, atol=1e-5)
    assert_equal_histories(histories(more), histories(plain))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("offset", [0, 7])
def test_history_moves_at_the_position_ids(name, offset):
    model = pruned(name, lambda: ProbePruning(momentum=0.5))
    before = histories(model)
    logits(model, ids(4, 10), position_ids=torch.arange(offset, offset + 10)[None])
    kept = kept_units(model)
    for (layer, block), history in histories(model).items():
        moved = (history != before[layer, block]).any(1).nonzero().flatten().tolist()
        assert moved == list(range(offset, offset + 10))
        if block == "mlp":  # kept channels only
            moved = (history != before[layer, block]).any(0).nonzero().flatten().tolist()
            assert set(moved) <= set(kept[layer].mlp.tolist())


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_explicit_positions_that_say_the_same_change_nothing(name):
    plain, told = pruned(name, METHODS["pp"]), pruned(name, METHODS["pp"])
    expected = logits(plain, ids(4, 20))
    found = logits(told, ids(4, 20), position_ids=torch.arange(20)[None])
    assert choices(kept_units(told)) == choices(kept_units(plain))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_equal_histories(histories(told), histories(plain))


@pytest.mark.parametrize("name", ["llama", "opt"])
class TestPositionsBeyondTheCalibratedOnes:
    def test_longer_text(self, name):
        model = pruned(name, ProbePruning)
        logits(model, ids(2, CALIBRATED))
        with pytest.raises(UserError, match="position 32 is beyond the 32 calibrated positions: calibrate on longer"):
            logits(model, ids(2, CALIBRATED + 1))

    def test_longer_text_with_a_mask(self, name):
        model = pruned(name, ProbePruning)
        with pytest.raises(UserError, match="position 33 is beyond the 32 calibrated positions"):
            run(model, padded(ids(2, CALIBRATED + 2), left=1))

    def test_explicit_positions(self, name):
        model = pruned(name, ProbePruning)
        with pytest.raises(UserError, match="position 35 is beyond the 32 calibrated positions"):
            logits(model, ids(2, 16), position_ids=torch.arange(20, 36)[None])

    def test_pads_do_not_count(self, name):
        plain, wide = pruned(name, METHODS["pp"]), pruned(name, METHODS["pp"])
        expected = logits(plain, ids(3, CALIBRATED))
        found = run(wide, padded(ids(3, CALIBRATED), left=9))
        torch.testing.assert_close(found[:, 9:], expected, rtol=1e-5, atol=1e-5)

    def test_methods_without_history_have_no_limit(self, name):
        model = pruned(name, FullBatchProbing)
        assert logits(model, ids(2, CALIBRATED + 20)).shape[1] == CALIBRATED + 20

    def test_a_refused_batch_leaves_no_trace(self, name):
        model = pruned(name, ProbePruning)
        before = histories(model)
        with pytest.raises(UserError, match="beyond"):
            logits(model, ids(2, CALIBRATED + 1))
        assert kept_units(model) == {}
        assert all(torch.equal(history, before[key]) for key, history in histories(model).items())


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", ["pp", "full_batch"])
def test_mask_of_four_dimensions(kind, side, method):
    """Who may attend whom tells padding from text, too."""
    flat, square = pruned("llama", METHODS[method]), pruned("llama", METHODS[method])
    batch = ragged([24, 3, 17, 9], side)
    real = batch["attention_mask"].bool()
    expected = run(flat, batch, explicit=True)
    allowed = real[:, None, None, :] & torch.ones(24, 24, dtype=torch.bool).tril()
    mask = allowed if kind == "bool" else torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo().min)
    positions = position_ids(batch["attention_mask"])
    found = logits(square, batch["input_ids"], attention_mask=mask, position_ids=positions)
    assert choices(kept_units(square)) == choices(kept_units(flat))
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)
    assert_equal_histories(histories(square), histories(flat))


def test_mask_of_three_dimensions():
    model = pruned("llama", ProbePruning)
    with pytest.raises(UserError, match=r"need a 2-D attention mask \(rows, tokens\)"):
        logits(model, ids(2, 8), attention_mask=torch.ones(2, 8, 8))


def test_embeddings_instead_of_ids():
    plain, model = pruned("llama", ProbePruning), pruned("llama", ProbePruning)
    expected = logits(plain, ids())
    with torch.no_grad():
        found = model(inputs_embeds=model.get_input_embeddings()(ids()), use_cache=False).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("left", "right"), [(6, 0), (0, 6), (3, 3)])
def test_scores_do_not_see_the_padding(attention, left, right):
    """A padded batch has room for more tokens in its probe; what fills it must not be attended to."""
    text = ids(5, 22)
    text[:, -1] = 9  # the last column is part of the probe: what fills the room is that column once more
    found = []
    for batch in (padded(text), padded(text, left, right)):
        model, method = tiny("llama", attn_implementation=attention), RecordingProbePruning()
        with torch.no_grad():
            model.get_input_embeddings().weight[9] *= 20
        prune_(model, method, calibrate(model, calibration_batches(), progress=False), **SETTINGS)
        run(model, batch)
        found.append(method.taken(PRUNED))
    for key, record in found[0].items():
        assert record.probe.tokens[-1] == 21
        torch.testing.assert_close(found[1][key].scores, record.scores, rtol=1e-4, atol=0)
        assert len(found[1][key].probe.tokens) > len(record.probe.tokens)
