"""The cache has the name that this transformers gives it: ``past_key_values``, or ``cache`` since 5.24."""

import logging
import warnings

import pytest
import torch
from transformers import DynamicCache

from pp_lightning.benchmark.decoding import EagerDecoder
from pp_lightning.caches import CACHE, cache_in, cache_name, without_cache
from pp_lightning.continuation import continued_logits
from pp_lightning.counting import counted_flops
from pp_lightning.export.verify import model_runner
from tests.models import ids, pruned, tiny

OLD = "past_key_values"


def verified(model):
    run, text = model_runner(model), ids(2, 12)
    _, cache = run(text, torch.ones_like(text), None)
    run(text[:, :1], torch.ones(2, 13, dtype=torch.long), cache)


def decoded(model):
    decoder = EagerDecoder(model)
    cache = decoder.empty_cache()
    decoder.logits(ids(2, 12), cache, 0)
    decoder.logits(ids(2, 1), cache, 1)


OWN_CALLS = {
    "continuation": lambda model: continued_logits(model, ids(2, 16), None, 12),
    "without a cache": lambda model: model(input_ids=ids(2, 12), use_cache=False),
    "generation": lambda model: model.generate(ids(2, 12), max_new_tokens=2, do_sample=False),
    "verification": verified,
    "decoding": decoded,
    "counting": lambda _: counted_flops(lambda: tiny("qwen3"), 1, 2, past=3),
}


@pytest.fixture
def said(caplog):
    """What transformers logs too: it warns of arguments, and logs what is said of outputs."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield lambda: [str(one.message) for one in found] + caplog.messages
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("own", OWN_CALLS.values(), ids=OWN_CALLS)
def test_own_calls_say_no_old_name(own, said):
    with torch.no_grad():
        own(pruned())
    assert not [text for text in said() if OLD in text]


@pytest.mark.skipif(CACHE == OLD, reason="not renamed yet")
def test_the_old_name_is_heard_of(said):
    """Or the test above would pass on anything."""
    tiny("llama")(input_ids=ids(2, 12), **{OLD: DynamicCache()})
    assert [text for text in said() if OLD in text]


@torch.no_grad()
def test_a_part_of_a_model_takes_the_old_name():
    """Its hooks see the name that the caller says."""
    found = []
    for name in (OLD, CACHE):
        model, cache = pruned().model, DynamicCache()
        model(input_ids=ids(2, 12), **{name: cache})
        found.append(model(input_ids=ids(2, 1), **{name: cache}).last_hidden_state)
    assert torch.equal(*found)


def test_arguments_hold_a_cache_under_any_name():
    for name in (CACHE, OLD, "layer_past"):
        given = {"attention_mask": 1, name: "filled", "use_cache": True}
        assert (cache_name(given), cache_in(given)) == (name, "filled")
        assert without_cache(given) == {"attention_mask": 1, name: None, "use_cache": False}
    assert cache_name({CACHE: None, "attention_mask": 1}) is cache_in({}) is None
