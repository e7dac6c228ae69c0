import pytest
import torch

from pp_lightning import kept_units, prune_
from pp_lightning.functional.moments import TokenPositions
from pp_lightning.methods import FullBatchProbing, ProbePruning
from tests.models import MODELS, SETTINGS, choices, ids, logits, padded, ragged, statistics, tiny

BATCHES = {
    "plain": lambda: {"input_ids": ids()},
    "few_tokens": lambda: {"input_ids": ids(3, 6)},
    "padded": lambda: padded(ids(), left=3, right=2),
    "ragged_left": lambda: ragged([24, 3, 17, 9], "left"),
    "ragged_right": lambda: ragged([24, 3, 17, 9], "right"),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", BATCHES)
def test_is_probe_pruning_with_everything_as_the_probe(name, batch):
    given = BATCHES[batch]()
    mask = {k: v for k, v in given.items() if k == "attention_mask"}
    found = []
    for method in (FullBatchProbing(), ProbePruning(token_ratio=1.0, row_ratio=1.0, fusion_weight=1.0)):
        model = tiny(name)
        prune_(model, method, statistics(name), **SETTINGS)
        out = logits(model, given["input_ids"], **mask)
        if mask:
            out = out[given["attention_mask"].bool()]
        found.append((choices(kept_units(model)), out))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_energy_is_the_moment_summed_over_positions():
    states = torch.randn(3, 4, 5)
    method = FullBatchProbing()
    expected = [sum(states[b, t, c].item() ** 2 / 3 for b in range(3) for t in range(4)) for c in range(5)]
    torch.testing.assert_close(
        method.observe(states, None, None, None, None).energy, torch.tensor(expected), rtol=1e-5, atol=0
    )


def test_energy_counts_real_rows_at_each_position():
    states = torch.ones(2, 3, 1)
    states[1, 2] = float("nan")
    real = torch.tensor([[True, True, True], [True, True, False]])
    places = TokenPositions(torch.arange(3).repeat(2, 1), real, 3)
    assert FullBatchProbing().observe(states, None, places, None, None).energy.tolist() == [3.0]


def test_the_probe_is_everything():
    method = FullBatchProbing()
    assert method.select(torch.randn(2, 3, 4), torch.randn(2, 3, 4), None) is None
    assert method.probe_sizes(20, 1024) == (20, 1024)
