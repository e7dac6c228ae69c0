"""Counts that are searched: never worse on the batches held out, never dearer, and the model is left as it was."""

import pytest
import torch

from pp_lightning import LeastSquares, calibrate, prune_, unprune_
from pp_lightning.blocks import Block
from pp_lightning.errors import UserError
from pp_lightning.methods import StaticBest, StaticPPsp
from pp_lightning.pruning import pruning_of
from tests.models import calibration_batches, ids, logits, statistics, tiny

ASKED = {"pruning_ratio": 0.4, "skip_layers": (0, 1), "round_to": 16}


@torch.no_grad()
def trained_a_little(name):
    """Random models have nothing to lose: one whose loss depends on its layers."""
    model = tiny(name)
    batches = calibration_batches(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with torch.enable_grad():
        for _ in range(30):
            for batch in batches:
                optimizer.zero_grad()
                model(**batch, labels=batch["input_ids"]).loss.backward()
                optimizer.step()
    return model.eval(), batches


@pytest.mark.slow
def test_a_search_lowers_the_held_out_loss_at_no_more_flops():
    model, batches = trained_a_little("llama")
    stats, text = calibrate(model, batches, progress=False), ids()
    dense = logits(model, text)
    found, lines = {}, []
    for allocation in ("global", "searched"):
        update = LeastSquares(batches, passes=80, tell=lines.append)
        prune_(model, StaticBest(allocation), stats, **ASKED, update=update)
        pruning = pruning_of(model)
        assert bool(pruning.path) == (allocation == "searched")
        found[allocation] = dict(pruning.keep), list(pruning.path)
        unprune_(model)
        assert torch.equal(logits(model, text), dense)
    (start, _), (end, path) = found["global"], found["searched"]
    assert len(path) > 1 and path[-1]["loss"] < path[0]["loss"] and path[-1]["passes_left"] >= 0
    assert start != end
    # weights of a unit twice, and a head's products with keys and values
    cost = {Block.ATTENTION: 4 * 8 * 64 * 2 + 4 * 32 * 8, Block.MLP: 3 * 64 * 2}
    assert sum(n * cost[k[1]] for k, n in end.items()) <= sum(n * cost[k[1]] for k, n in start.items())
    assert all(n % 16 == 0 for (_, block), n in end.items() if block is Block.MLP)
    assert any("passes left" in line for line in lines)


@pytest.mark.slow
def test_the_same_batches_give_the_same_counts_and_no_passes_the_ranking():
    model, batches = trained_a_little("opt")
    stats = calibrate(model, batches, progress=False)
    found = []
    for allocation, passes in (("searched", 60), ("searched", 60), ("searched", 1), ("global", 1)):
        prune_(model, StaticBest(allocation), stats, **ASKED, update=LeastSquares(batches, passes=passes))
        found.append(dict(pruning_of(model).keep))
        unprune_(model)
    assert found[0] == found[1] and found[2] == found[3]


def test_a_search_needs_an_update():
    with pytest.raises(UserError, match="give update too"):
        prune_(tiny("llama"), StaticPPsp(), statistics("llama"), **ASKED, allocation="searched")
