"""All batches through one layer before the next: the same outputs and histories as batch by batch."""

import pytest
import torch

from pp_lightning import calibrate, prune_
from pp_lightning.errors import UserError
from pp_lightning.methods import FLAP, FullBatchProbing, ProbePruning
from pp_lightning.passes import outputs_layer_by_layer
from pp_lightning.pruning import kept_units, pruning_of
from pp_lightning.state import pruning_state
from tests.models import SETTINGS, calibration_batches, ids, padded
from tests.streamed import both

NAMES = ["llama", "gemma3_text", "opt"]


@torch.no_grad()
def batch_by_batch(model, batches):
    return [model(**batch, use_cache=False).logits for batch in batches]


def texts(with_padding=False):
    """Batches of different sizes, as a last one may be smaller."""
    one = padded(ids(3, 20, seed=7), left=4) if with_padding else {"input_ids": ids(3, 20, seed=7)}
    return [{"input_ids": ids(seed=5)}, one, {"input_ids": ids(2, 9, seed=6)}]


def assert_same(whole, streamed, batches):
    expected = batch_by_batch(whole, batches)
    found = [output.logits for output in outputs_layer_by_layer(streamed, batches)]
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)
    return expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", [None, FLAP(), ProbePruning(row_ratio=0.5), ProbePruning.best(), FullBatchProbing()])
def test_outputs_and_histories_are_the_same_bits(tmp_path, name, method):
    whole, streamed = both(tmp_path, name)
    batches = texts(with_padding=name != "gemma3_text")
    plain = batch_by_batch(whole, batches)
    if method is not None:
        for model in (whole, streamed):
            prune_(model, method, calibrate(model, calibration_batches(), progress=False), **SETTINGS)
        before = pruning_state(whole)
    outputs = assert_same(whole, streamed, batches)
    if method is None:
        return
    assert not torch.equal(outputs[0], plain[0])
    assert str(kept_units(whole)) == str(kept_units(whole))
    after, found = pruning_state(whole), pruning_state(streamed)
    assert after.keys() == found.keys() and all(torch.equal(after[key], found[key]) for key in after)
    if any(key.startswith("history") for key in before):
        assert any(not torch.equal(after[key], before[key]) for key in before)
    assert_same(whole, streamed, batches)  # which go on from there


def test_random_probes_are_drawn_as_in_memory(tmp_path):
    whole, streamed = both(tmp_path, "llama")
    method = ProbePruning(row_ratio=0.5, rank_by="random")
    for model in (whole, streamed):
        prune_(model, method, calibrate(model, calibration_batches(), progress=False), **SETTINGS)
    assert_same(whole, streamed, texts())
    assert pruning_of(streamed).context.num_batches == 3


def test_layers_that_probe_for_each_other_are_refused(tmp_path):
    _, model = both(tmp_path, "llama")
    stats = calibrate(model, calibration_batches(), progress=False)
    prune_(model, ProbePruning(probe_source="previous"), stats, **SETTINGS)
    with pytest.raises(UserError, match="cannot be run alone"):
        next(outputs_layer_by_layer(model, texts()))
