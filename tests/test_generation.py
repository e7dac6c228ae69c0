"""generate() on a pruned model: the prompt chooses, the choice is held while decoding."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from pp_lightning import UserError, kept_units, prune_, unprune_
from pp_lightning.families import shape_of
from pp_lightning.methods import FullBatchProbing, ProbePruning, WandaSP
from pp_lightning.pruned.slices import BlockSlices
from tests.models import (
    GROUPED,
    GROUPS,
    HEADS,
    MODELS,
    PRUNED,
    SETTINGS,
    choices,
    greedy_without_cache,
    held_by,
    histories,
    ids,
    logits,
    masked_dense,
    padded,
    ragged,
    statistics,
    tiny,
)

STEPS = 10
CASES = [
    *((name, "default") for name in MODELS),
    *((name, "query_head") for name in GROUPED),
]


def pruned(name, unit="default", method=ProbePruning, **settings):
    model = tiny(name)
    model.generation_config.eos_token_id = None  # always all the steps
    chosen = method() if unit == "default" else method(attention_unit=unit)
    prune_(model, chosen, statistics(name), **SETTINGS, **settings)
    return model


def num_units(name, unit):
    return HEADS if unit == "query_head" else shape_of(tiny(name).config).num_key_value_heads


def reference(model, name, unit="default"):
    """The dense model with the choice of the last prompt zeroed for good."""
    masked = masked_dense(tiny(name), kept_units(model), num_units(name, unit))
    masked.generation_config.eos_token_id = None
    return masked


def generate(model, batch, **settings):
    given = {"do_sample": False, "max_new_tokens": STEPS, "pad_token_id": 0, **settings}
    if "attention_mask" not in batch:
        batch = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
    found = model.generate(**batch, **given)
    return found[:, batch["input_ids"].shape[1] :]


@pytest.mark.parametrize(("name", "unit"), CASES)
def test_greedy_equals_the_sliced_model_without_cache(name, unit):
    model = pruned(name, unit)
    found = []
    for seed in (1, 2):
        batch = {"input_ids": ids(3, 20, seed)}
        tokens = generate(model, batch)
        found.append(choices(kept_units(model)))
        assert tokens.shape == (3, STEPS)
        assert torch.equal(tokens, greedy_without_cache(reference(model, name, unit), batch, STEPS))
    assert found[0] != found[1]  # a second prompt, a second choice


@pytest.mark.parametrize(("name", "unit"), CASES)
def test_each_step_gives_the_logits_of_the_sliced_model(name, unit):
    """Greedy tokens alone could agree by luck."""
    model, text = pruned(name, unit), ids(3, 28, 1)
    with torch.no_grad():
        first = model(input_ids=text[:, :20], use_cache=True)
        found = [first.logits]
        for step in range(20, 28):
            out = model(input_ids=text[:, step : step + 1], past_key_values=first.past_key_values, use_cache=True)
            found.append(out.logits)
    expected = logits(reference(model, name, unit), text)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama_gqa", "mistral", "opt"])
def test_several_tokens_at_once_continue_a_cache(name):
    model, text = pruned(name), ids(3, 28, 1)
    with torch.no_grad():
        first = model(input_ids=text[:, :20], use_cache=True)
        rest = model(input_ids=text[:, 20:], past_key_values=first.past_key_values, use_cache=True)
    expected = logits(reference(model, name), text)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "unit"), CASES)
@pytest.mark.parametrize("method", [ProbePruning, pytest.param(FullBatchProbing, marks=pytest.mark.slow)])
def test_left_padded_prompts(name, unit, method):
    model = pruned(name, unit, method)
    batch = ragged([20, 4, 13], "left", 5)
    tokens = generate(model, batch)
    assert torch.equal(tokens, greedy_without_cache(reference(model, name, unit), batch, STEPS))


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_padding_alone_does_not_change_the_tokens(name):
    plain, wide = pruned(name), pruned(name)
    text = ids(3, 18, 4)
    expected = generate(plain, {"input_ids": text})
    assert torch.equal(generate(wide, padded(text, left=6)), expected)
    assert choices(kept_units(wide)) == choices(kept_units(plain))


@pytest.mark.parametrize(("name", "unit"), CASES)
@pytest.mark.parametrize("method", [ProbePruning, pytest.param(FullBatchProbing, marks=pytest.mark.slow)])
def test_static_cache(name, unit, method):
    for batch in ({"input_ids": ids(3, 20, 1)}, ragged([20, 4, 13], "left", 5)):
        dynamic, static = pruned(name, unit, method), pruned(name, unit, method)
        expected = generate(dynamic, batch)
        assert torch.equal(generate(static, batch, cache_implementation="static"), expected)
        assert torch.equal(expected, greedy_without_cache(reference(static, name, unit), batch, STEPS))


@pytest.mark.parametrize("name", ["llama_gqa", "opt"])
@torch.no_grad()
def test_a_cache_of_fixed_size_finds_its_slices_made(monkeypatch, name):
    """On accelerators transformers compiles decoding with one: slices made inside a CUDA graph would not outlive it."""
    model, made = pruned(name), []
    cache = StaticCache(config=model.config, max_cache_len=24)
    model(input_ids=ids(2, 12), past_key_values=cache, use_cache=True)
    held = list(held_by(cache))
    assert None not in held
    monkeypatch.setattr(BlockSlices, "of", lambda *_, **__: made.append(1))
    model(input_ids=ids(2, 1), past_key_values=cache, use_cache=True)
    assert not made
    assert all(now is before for now, before in zip(held_by(cache), held, strict=True))


@pytest.mark.parametrize("name", ["llama", "llama_gqa", "opt"])
def test_beams(name):
    model, batch = pruned(name), {"input_ids": ids(2, 20, 1)}
    tokens = generate(model, batch, num_beams=3)
    assert torch.equal(tokens, generate(reference(model, name), batch, num_beams=3))


@pytest.mark.parametrize("name", ["llama", "llama_gqa", "opt"])
def test_sampling(name):
    model, batch = pruned(name), {"input_ids": ids(3, 20, 1)}
    settings = {"do_sample": True, "temperature": 1.3, "top_k": 0}
    torch.manual_seed(7)
    tokens = generate(model, batch, **settings)
    torch.manual_seed(7)
    assert torch.equal(tokens, generate(reference(model, name), batch, **settings))
    torch.manual_seed(8)
    assert not torch.equal(tokens, generate(model, batch, **settings))


@pytest.mark.parametrize("name", MODELS)
def test_without_cache_every_step_is_a_batch_of_its_own(name):
    model = pruned(name)
    before = histories(model)[3, "mlp"]
    generate(model, {"input_ids": ids(2, 20)}, use_cache=False, max_new_tokens=3)
    moved = (histories(model)[3, "mlp"] != before).any(1).nonzero().flatten()
    assert moved.max() == 21  # positions 20 and 21 were part of a prompt


@pytest.mark.parametrize("name", ["llama", "llama_gqa", "opt"])
def test_history_does_not_move_while_decoding(name):
    found = []
    for steps in (1, STEPS):  # the first token is the prompt's own
        model = pruned(name)
        before = histories(model)
        generate(model, {"input_ids": ids(3, 20)}, max_new_tokens=steps)
        found.append(histories(model))
        assert not torch.equal(found[-1][3, "mlp"], before[3, "mlp"])
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_decoding_goes_beyond_the_calibrated_positions():
    model, batch = pruned("llama"), {"input_ids": ids(2, 30)}
    tokens = generate(model, batch)  # 32 positions are calibrated
    assert torch.equal(tokens, greedy_without_cache(reference(model, "llama"), batch, STEPS))


@pytest.mark.parametrize("steps", [4, STEPS])
def test_slices_are_made_once_while_decoding(monkeypatch, steps):
    made = []
    original = BlockSlices.of

    def counted(self, *args, **kwargs):
        sliced = original(self, *args, **kwargs)
        made.extend((self, name) for name in sliced)
        return sliced

    model = pruned("llama")
    monkeypatch.setattr(BlockSlices, "of", counted)
    generate(model, {"input_ids": ids(3, 20)}, max_new_tokens=1)
    prefill = len(made)
    assert prefill == 7 * len(PRUNED)  # four projections of attention, three of the MLP
    made.clear()
    generate(model, {"input_ids": ids(3, 20, 2)}, max_new_tokens=steps)
    assert len(made) == 2 * prefill  # for the prompt, and once to be held


@pytest.mark.parametrize(
    ("name", "unit", "heads"),
    [("llama", "default", 3), ("llama_gqa", "default", 2), ("llama_gqa", "query_head", 3)],
)
def test_the_cache_holds_kept_heads_only(name, unit, heads):
    model = pruned(name, unit)
    with torch.no_grad():
        cache = model(input_ids=ids(3, 20), use_cache=True).past_key_values
    for index, layer in enumerate(cache.layers):
        dense = GROUPS if MODELS[name].grouped else HEADS
        assert layer.keys.shape[1] == layer.values.shape[1] == (heads if index in PRUNED else dense)


@pytest.mark.parametrize("name", ["llama", "opt"])
class TestCacheOfAnotherChoice:
    message = "key/value cache belongs to another model or pruning, whose heads are others: run its prompt again"

    def continued(self, model, cache):
        with torch.no_grad():
            return model(input_ids=ids(3, 1, 9), past_key_values=cache, use_cache=True).logits

    def prompt(self, model, seed=1):
        with torch.no_grad():
            return model(input_ids=ids(3, 20, seed), use_cache=True).past_key_values

    def test_of_the_dense_model(self, name):
        model = pruned(name)
        cache = self.prompt(tiny(name))
        with pytest.raises(UserError, match=self.message):
            self.continued(model, cache)
        self.prompt(model)
        with pytest.raises(UserError, match=self.message):
            self.continued(model, self.prompt(tiny(name)))

    def test_of_an_earlier_pruning(self, name):
        model = pruned(name)
        cache = self.prompt(model)
        unprune_(model)
        prune_(model, ProbePruning(), statistics(name), **SETTINGS)
        self.prompt(model, 2)
        with pytest.raises(UserError, match=self.message):
            self.continued(model, cache)

    def test_of_another_model(self, name):
        model, other = pruned(name), pruned(name)
        cache = self.prompt(other)
        self.prompt(model, 2)
        with pytest.raises(UserError, match=self.message):
            self.continued(model, cache)

    def test_a_refused_prompt_changes_nothing(self, name):
        model = pruned(name)
        cache = self.prompt(model)
        with pytest.raises(UserError, match="beyond the 32 calibrated positions"), torch.no_grad():
            model(input_ids=ids(3, 40, 2))
        assert torch.isfinite(self.continued(model, cache)).all()

    def test_an_emptied_cache_is_a_new_prompt(self, name):
        model, fresh = pruned(name), pruned(name)
        cache = DynamicCache()
        with torch.no_grad():
            found = model(input_ids=ids(3, 20, 1), past_key_values=cache, use_cache=True).logits
            expected = fresh(input_ids=ids(3, 20, 1), use_cache=True).logits
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", MODELS)
def test_static_methods_generate(name):
    model, batch = pruned(name, method=WandaSP), {"input_ids": ids(3, 20, 1)}
    assert torch.equal(generate(model, batch), greedy_without_cache(reference(model, name), batch, STEPS))


def test_unpruned_again_it_generates_as_before():
    dense = tiny("llama")
    dense.generation_config.eos_token_id = None
    batch = {"input_ids": ids(3, 20, 1)}
    model = pruned("llama")
    for cache in ({}, {"cache_implementation": "static"}):
        generate(model, batch, **cache)
    unprune_(model)
    for cache in ({}, {"cache_implementation": "static"}):
        assert torch.equal(generate(model, batch, **cache), generate(dense, batch, **cache))
