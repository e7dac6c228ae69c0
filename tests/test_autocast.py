"""Autocast: pruned models run where the stock model does, with caches that grow and caches of fixed size."""

import pytest
import torch

from pp_lightning import frozen_history, prune_
from pp_lightning.methods import FLAP, FullBatchProbing, ProbePruning
from tests.models import SETTINGS, ids, ragged, statistics, tiny

BATCHES = {"whole": {"input_ids": ids(2, 9)}, "padded": ragged([9, 5], "left")}


def pruned(method, attention):
    model = tiny("opt", attn_implementation=attention)
    prune_(model, method(), statistics("opt"), **SETTINGS)
    return model


def decoded(model, batch, **how):
    with frozen_history(model), torch.autocast("cpu", torch.bfloat16):
        settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        found = model.generate(**batch, **settings, **how, output_logits=True, return_dict_in_generate=True)
    return found.sequences, torch.stack(found.logits)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", [ProbePruning, FullBatchProbing, FLAP])
def test_opt_says_the_same_with_both_kinds_of_caches(method, attention, batch):
    model = pruned(method, attention)
    growing, fixed = (decoded(model, BATCHES[batch], **how) for how in ({}, {"cache_implementation": "static"}))
    assert torch.equal(growing[0], fixed[0])
    torch.testing.assert_close(fixed[1], growing[1], rtol=0.02, atol=0.02)  # bfloat16
