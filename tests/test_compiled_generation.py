"""Decoding in one graph, as ``generate`` compiles it for caches of fixed size: on accelerators always, here if asked.

The backend ``eager`` runs what dynamo has traced as it is. Whether there is one graph, when it is made again and what
it computes are known from that; one slow test compiles for real.
"""

import copy

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache

from pp_lightning import UserError, compile_, kept_units, prune_
from pp_lightning.methods import FullBatchProbing, ProbePruning
from tests.models import (
    MODELS,
    SETTINGS,
    choices,
    held_by,
    histories,
    ids,
    logits,
    ragged,
    statistics,
    tiny,
)
from tests.test_generation import STEPS, generate, pruned

SLIDING = {"mistral", "qwen2"}  # transformers counts tokens in windows in Python: a second graph, for all other counts
BOTH = ("paper", "best")
METHODS = {
    "paper": ProbePruning,
    "best": ProbePruning.best,
    "full_batch": FullBatchProbing,
    "query_head": lambda: ProbePruning(attention_unit="query_head"),
}
# Every model with both methods, with padding under one of them.
COMBINATIONS = [
    *((name, method, (number % 2 == 0) == (method == "best")) for number, name in enumerate(MODELS) for method in BOTH),
    ("llama", "full_batch", False),
    ("llama_gqa", "query_head", True),
    ("qwen3", "query_head", False),
]


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()


def compiled(backend="eager"):
    """Settings of generate that make it compile decoding, on a CPU too."""
    config = CompileConfig(fullgraph=True, mode="default", backend=backend)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def graphs():
    return counters["stats"]["unique_graphs"]


def step(model):
    """One token, in one graph."""
    return torch.compile(model.__call__, backend="eager", fullgraph=True)


@torch.no_grad()
def prompt(model, seed=1, tokens=20):
    cache = StaticCache(config=model.config, max_cache_len=tokens + STEPS)
    model(input_ids=ids(3, tokens, seed), past_key_values=cache, use_cache=True)
    return cache


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method", "padded"), COMBINATIONS)
def test_one_graph_decodes_for_all_prompts(name, method, padded):
    eager, model = (pruned(name, method=METHODS[method]) for _ in range(2))
    found = []
    for seed in (1, 2, 3):
        batch = ragged([20, 4, 13], "left", seed) if padded else {"input_ids": ids(3, 20, seed)}
        assert torch.equal(generate(model, batch, **compiled()), generate(eager, batch))
        found.append(choices(kept_units(model)))
        assert choices(kept_units(eager)) == found[-1]
        assert graphs() == (2 if name in SLIDING else 1)
    assert found[0] != found[1], "three prompts of one choice would show nothing"
    for key, history in histories(eager).items():
        torch.testing.assert_close(histories(model)[key], history, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama_gqa", "opt"])
def test_compiled_for_real(name):
    eager, model = pruned(name), pruned(name)
    for seed in (1, 2):
        batch = ragged([20, 4, 13], "left", seed)
        assert torch.equal(generate(model, batch, **compiled("inductor")), generate(eager, batch))


@pytest.mark.slow
def test_with_compiled_layers_too():
    """Prompts into a cache of fixed size stay eager, as transformers' own do; tokens run on a graph of the model."""
    eager, model = pruned("llama"), pruned("llama")
    compilation = compile_(model, mode="reduce-overhead")  # on a CPU like the default, but for its step
    for seed in (1, 2):
        batch = {"input_ids": ids(3, 20, seed)}
        assert torch.equal(generate(model, batch, **compiled()), generate(eager, batch))
    assert not compilation.graphs


@pytest.mark.slow
@torch.no_grad()
def test_one_graph_for_conversations_side_by_side():
    """Held or let go: slices that went are made in a second graph, token by token."""
    model, eager = pruned("llama", held_slices=2), pruned("llama", held_slices=2)
    decode, caches = step(model), []
    for seed in (1, 2, 3):
        caches.append((prompt(model, seed), prompt(eager, seed)))
    assert [held_by(cache) is None for cache, _ in caches] == [True, False, False]
    for cache, other in [*caches[1:], *caches[1:], *caches]:
        found = decode(input_ids=ids(3, 1), past_key_values=cache, use_cache=True).logits
        expected = eager(input_ids=ids(3, 1), past_key_values=other, use_cache=True).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert graphs() == (2 if cache is caches[0][0] else min(graphs(), 2))
    assert graphs() == 2


@pytest.mark.slow
@torch.no_grad()
def test_a_cache_of_another_model_is_refused():
    model, other = pruned("llama"), pruned("llama")
    decode, own, foreign = step(model), prompt(model, 1), prompt(other, 1)
    decode(input_ids=ids(3, 1), past_key_values=own, use_cache=True)
    with pytest.raises(Exception, match=r"another model or pruning|UserError"):
        decode(input_ids=ids(3, 1), past_key_values=foreign, use_cache=True)
    with pytest.raises(UserError, match="another model or pruning"):
        model(input_ids=ids(3, 1), past_key_values=foreign, use_cache=True)
    decode(input_ids=ids(3, 1), past_key_values=own, use_cache=True)


@pytest.mark.slow
@torch.no_grad()
def test_a_copied_cache_goes_on():
    model = pruned("llama")
    decode, cache = step(model), prompt(model)
    copied = copy.deepcopy(cache)
    found = [decode(input_ids=ids(3, 1), past_key_values=one, use_cache=True).logits for one in (cache, copied)]
    assert torch.equal(*found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mistral"])
@torch.no_grad()
def test_an_emptied_cache_is_a_new_prompt(name):
    model, fresh = pruned(name), pruned(name)
    cache = prompt(model, 1)
    step(model)(input_ids=ids(3, 1), past_key_values=cache, use_cache=True)
    cache.reset()
    found = model(input_ids=ids(3, 20, 2), past_key_values=cache, use_cache=True).logits
    prompt(fresh, 1)
    expected = fresh(input_ids=ids(3, 20, 2), use_cache=True).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert choices(kept_units(model)) == choices(kept_units(fresh))
    copied = copy.deepcopy(cache)
    copied.reset()
    model(input_ids=ids(3, 1), past_key_values=cache, use_cache=True)  # the original is still filled


@pytest.mark.parametrize("name", ["llama", "qwen2", "opt"])
@torch.inference_mode()
def test_what_decoding_reads_stays_where_it_is(name):
    """CUDA graphs read it there: what moves is recorded again, for every prompt."""
    model, found = pruned(name, method=ProbePruning.best), []
    for seed in (1, 2, 3):
        cache = prompt(model, seed)
        held = [
            tensor.data_ptr()
            for one in held_by(cache)
            for matrix in one.values()
            for tensor in matrix
            if tensor is not None
        ]
        found.append((held, choices(kept_units(model))))
        del cache  # as when generate() has ended
    assert found[0][0] == found[1][0] == found[2][0]
    assert found[1][1] != found[2][1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama_gqa", "opt"])
@torch.inference_mode()
def test_a_whole_model_compiles_once_for_all_batches(name):
    """``torch.compile(model)``, by whoever does not know :func:`compile_`."""
    eager, model = tiny(name), tiny(name)
    for one in (eager, model):
        prune_(one, ProbePruning(row_ratio=0.3), statistics(name), **SETTINGS)
        logits(one, ids())  # makes the memory for slices
    whole, found = torch.compile(model, backend="eager", fullgraph=True), []
    for seed in (1, 2, 3):
        expected = logits(eager, ids(seed=seed))
        torch.testing.assert_close(logits(whole, ids(seed=seed)), expected, rtol=1e-5, atol=1e-5)
        assert choices(kept_units(model)) == choices(kept_units(eager))
        found.append(choices(kept_units(model)))
    assert found[0] != found[1]
    assert graphs() == 1


@pytest.mark.slow
@torch.inference_mode()
def test_random_samples_are_drawn_outside_of_graphs():
    """Within a graph all batches would have those of the first."""
    eager, model = tiny("llama"), tiny("llama")
    for one in (eager, model):
        prune_(one, ProbePruning.best(), statistics("llama"), **SETTINGS)
        logits(one, ids())
    whole, made = torch.compile(model, backend="eager"), []
    for seed in (1, 2, 3):
        expected = logits(eager, ids(seed=seed))
        torch.testing.assert_close(logits(whole, ids(seed=seed)), expected, rtol=1e-5, atol=1e-5)
        assert choices(kept_units(model)) == choices(kept_units(eager))
        made.append(graphs())
    assert made[0] == made[2]
