"""Packed slices: the same model, with less to copy."""

import pytest
import torch

from pp_lightning import kept_units, prune_
from pp_lightning.functional.selection import take_rows
from pp_lightning.methods import ProbePruning
from pp_lightning.pruned.packing import PackedSlice, gather_units
from pp_lightning.pruning import pruners_of
from tests.models import MODELS, SETTINGS, choices, histories, ids, statistics, tiny


def test_replacing_leaves_what_stays_where_it_is():
    whole = {"a": torch.randn(12, 3), "b": torch.randn(6, 5)}
    widths = {"a": 2, "b": 1}
    packed = PackedSlice(whole, widths, torch.tensor([0, 1, 4]))
    before = packed.rows["a"].clone()
    packed.replace(whole, widths, torch.tensor([1, 3, 4]))
    assert packed.slots.tolist() == [3, 1, 4], "unit 3 takes the place of unit 0"
    assert torch.equal(packed.rows["a"][2:], before[2:])
    for role, width in widths.items():
        assert torch.equal(packed.rows[role], take_rows(whole[role], packed.slots, width))


def test_only_new_units_are_copied():
    whole, widths = {"a": torch.randn(8, 3)}, {"a": 1}
    packed = PackedSlice(whole, widths, torch.tensor([0, 1, 2]))
    packed.rows["a"][1] = -1.0  # a mark on unit 1
    packed.replace(whole, widths, torch.tensor([1, 2, 7]))
    assert (packed.rows["a"][1] == -1.0).all(), "unit 1 stayed, so nothing was copied over the mark"
    packed.replace(whole, widths, torch.tensor([2, 3, 7]))
    packed.replace(whole, widths, torch.tensor([1, 2, 3]))
    assert not (packed.rows["a"] == -1.0).any()


def test_the_gather_is_that_of_rows():
    weight = torch.randn(8, 3)
    kept = torch.tensor([0, 3])
    assert torch.equal(gather_units(weight, kept, 2), weight[[0, 1, 6, 7]])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("rows", "ratio"), [(4, 0.4), (1, 0.2)])
def test_a_packed_model_is_the_same_model(name, rows, ratio):
    """With one row and little pruned the projections are shared, and only output matrices are packed."""
    plain, packs = tiny(name), tiny(name)
    settings = {**SETTINGS, "pruning_ratio": ratio}
    prune_(plain, ProbePruning(), statistics(name), **settings)
    prune_(packs, ProbePruning(), statistics(name), pack_slices=True, **settings)
    seen = set()
    for seed in range(4):
        with torch.inference_mode():
            expected, found = (model(ids(rows, 24, seed), use_cache=False).logits for model in (plain, packs))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert choices(kept_units(packs)) == choices(kept_units(plain))
        seen.add(str(choices(kept_units(packs))))
        for key, history in histories(plain).items():
            torch.testing.assert_close(histories(packs)[key], history, rtol=1e-5, atol=1e-6)
    assert len(seen) > 1, "choices must change, or nothing is replaced"
    block = next(iter(pruners_of(packs).values())).mlp
    assert block.slices.packed is not None
    assert (len(block.slices.packed.rows) == 1) == (rows == 1)
    assert next(iter(pruners_of(plain).values())).mlp.slices.packed is None


def test_a_packed_model_generates_and_moves():
    plain, packs = tiny("llama"), tiny("llama")
    prune_(plain, ProbePruning(), statistics("llama"), **SETTINGS)
    prune_(packs, ProbePruning(), statistics("llama"), pack_slices=True, **SETTINGS)
    settings = {"max_new_tokens": 5, "do_sample": False}
    for rows in (4, 1):
        assert torch.equal(packs.generate(ids(rows, 12), **settings), plain.generate(ids(rows, 12), **settings))
    packs.double()
    assert all(pruner.mlp.slices.packed is None for pruner in pruners_of(packs).values()), "made anew in the new dtype"
