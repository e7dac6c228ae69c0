"""Prompts that run dense, what follows them on their choice, and channels that are chosen again while decoding."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from pp_lightning import UserError, compile_, frozen_history, kept_units, prune_, pruning_state, unprune_
from pp_lightning.blocks import Block
from pp_lightning.families import blocks_of
from pp_lightning.methods import FullBatchProbing, Griffin, ProbePruning, WandaSP
from pp_lightning.prefill import dense_rows
from pp_lightning.pruning import pruning_of
from tests.models import (
    FAMILIES,
    GROUPED,
    GROUPS,
    HEADS,
    MODELS,
    PRUNED,
    SETTINGS,
    choices,
    families,
    ids,
    logits,
    ragged,
    silenced,
    statistics,
    tiny,
)

PROMPT = 14
METHODS = {
    "paper": ProbePruning,
    "best": ProbePruning.best,
    "generation": lambda: ProbePruning.best(generation=True),
    "history": lambda: ProbePruning(compensation="history"),
    "full_batch": FullBatchProbing,
    "griffin": Griffin,
}


def pruned(name="llama", method=ProbePruning, prefill="dense", **settings):
    model = tiny(name)
    model.generation_config.eos_token_id = None
    prune_(model, method(), statistics(name), prefill=prefill, **{**SETTINGS, **settings})
    return model


@torch.no_grad()
def continued(model, text, prompt=PROMPT, cache=None, **given):
    """Logits of the prompt, and of what follows it."""
    first = model(input_ids=text[:, :prompt], use_cache=True, past_key_values=cache, **given)
    rest = model(input_ids=text[:, prompt:], past_key_values=first.past_key_values, use_cache=True, **given)
    return first.logits, rest.logits


@torch.no_grad()
def dense_then_masked(model, name, text, **given):
    """The same of stock models: a dense one fills the cache, one without the dropped units goes on."""
    first = tiny(name)(input_ids=text[:, :PROMPT], use_cache=True, **given)
    rest = silenced(model, name)(input_ids=text[:, PROMPT:], past_key_values=first.past_key_values, **given)
    return first.logits, rest.logits


def close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", families())
def test_a_dense_prompt_and_masked_dense_behind_it(name):
    blocks = FAMILIES[name].blocks
    model = pruned(name, lambda: ProbePruning(blocks=blocks), skip_layers=(0,))
    found = continued(model, ids())
    close(found, dense_then_masked(model, name, ids()))
    assert (found[1] - continued(tiny(name), ids())[1]).abs().max() > 1e-2, "something was pruned"


@pytest.mark.parametrize("name", GROUPED)
def test_single_query_heads_of_a_group(name):
    model = pruned(name, lambda: ProbePruning(attention_unit="query_head"))
    close(continued(model, ids()), dense_then_masked(model, name, ids()))


@pytest.mark.parametrize("method", METHODS)
def test_every_dynamic_method_chooses_by_the_prompt_alone(method):
    model, text, other = pruned(method=METHODS[method]), ids(), ids(seed=7)
    other[:, :PROMPT] = text[:, :PROMPT]
    first = [one.logits for one in [tiny("llama")(input_ids=text[:, :PROMPT])]]
    close([continued(model, text)[0]], first)
    kept = choices(kept_units(model))
    continued(pruned(method=METHODS[method]), other)
    continued(model, text)
    again = pruned(method=METHODS[method])
    continued(again, other)
    assert choices(kept_units(again)) == kept
    assert all(len(kept[layer][1]) < 160 for layer in PRUNED)
    third = pruned(method=METHODS[method])
    continued(third, ids(seed=8))
    assert choices(kept_units(third)) != kept, "another prompt makes another choice"


def test_the_choice_is_that_of_a_probe_of_the_whole_batch():
    # With all rows and tokens in the probe, and nothing pruned in front of a block, both see the same states.
    settings = {"pruning_ratio": 0.1, "skip_layers": (0, 1, 2, 3)}
    found = []
    for prefill in ("dense", "probe"):
        model = pruned(
            "llama", lambda: ProbePruning(token_ratio=1.0, row_ratio=1.0, blocks=("attention",)), prefill, **settings
        )
        continued(model, ids())
        found.append(choices(kept_units(model)))
    assert found[0] == found[1]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", METHODS)
def test_padding_has_no_part_in_a_choice(side, method):
    batch = ragged([9, 14, 6], side)
    kept = []
    for fill in (5, 9):
        model = pruned(method=METHODS[method])
        text = torch.where(batch["attention_mask"].bool(), batch["input_ids"], fill)
        model(input_ids=text, attention_mask=batch["attention_mask"], use_cache=True)
        kept.append(choices(kept_units(model)))
    assert kept[0] == kept[1]


@pytest.mark.parametrize("name", ["llama", "llama_gqa", "mistral", "opt"])
def test_static_caches_serve_dense_and_pruned_prompts_in_turn(name):
    model = pruned(name)
    cache = StaticCache(config=model.config, max_cache_len=40)
    for number, prefill in enumerate(("dense", "dense", "probe", "dense", "probe", "probe", "dense")):
        unprune_(model)
        prune_(model, ProbePruning(), statistics(name), prefill=prefill, **SETTINGS)
        cache.reset()
        text = ids(2, seed=number)
        close(continued(model, text, cache=cache), continued(pruned(name, prefill=prefill), text))


def test_an_emptied_cache_takes_another_number_of_heads():
    model = pruned()
    cache = DynamicCache(config=model.config)
    with frozen_history(model):
        for number, below in enumerate((0, 100, 0, 100, 100)):
            pruning_of(model).context.dense_below = below
            text = ids(2, seed=number)
            expected = continued(model, text)
            close(continued(model, text, cache=cache), expected)
            cache.crop(-cache.get_seq_length())


def test_generate_with_a_static_cache_equals_a_growing_one():
    for method in METHODS.values():
        model = pruned("llama_gqa", method)
        given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        with frozen_history(model):
            expected = model.generate(ids(2), **given)
            fixed = {"cache_implementation": "static", "disable_compile": True}
            assert torch.equal(model.generate(ids(2), **given, **fixed), expected)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["paper", "generation"])
def test_compiled_layers_run_dense_prompts(only_traced, method):
    model = pruned(method=METHODS[method])
    compilation = compile_(model)
    with frozen_history(model):
        for seed in (0, 4):
            close(continued(model, ids(seed=seed)), continued(pruned(method=METHODS[method]), ids(seed=seed)))
    assert len(compilation.graphs) >= 1
    assert logits(model, ids()).isfinite().all()


def test_auto_is_dense_below_a_number_of_tokens_and_a_probe_from_there_on():
    dense = tiny("llama")(input_ids=ids()[:, :PROMPT]).logits
    for prefill, is_dense in ((4 * PROMPT, False), (4 * PROMPT + 1, True), ("auto", True), ("probe", False)):
        found = continued(pruned(prefill=prefill), ids())[0]
        assert torch.allclose(found, dense, atol=2e-5) is is_dense


@pytest.mark.parametrize(
    ("prefill", "is_dense"), [("auto", True), (4, True), ("dense", True), ("probe", False), (0, False)]
)
def test_a_single_row_runs_dense_whatever_its_length(prefill, is_dense):
    """Its probe is half of it, which never paid."""
    assert [dense_rows(one) for one in ("auto", 192, "dense", "probe", 0)] == [1, 1, 1, 0, 0]
    dense = tiny("llama")(input_ids=ids()[:1, :PROMPT]).logits
    found = continued(pruned(prefill=prefill), ids()[:1])[0]
    assert torch.allclose(found, dense, atol=2e-5) is is_dense


def test_without_a_cache_nothing_runs_dense():
    for method in METHODS.values():
        model = pruned(method=method)
        assert not torch.allclose(logits(model, ids()), logits(tiny("llama"), ids()), atol=1e-2)
        assert torch.equal(logits(model, ids()), logits(model, ids())) or method is not Griffin


@pytest.mark.parametrize("method", METHODS)
def test_a_dense_prompt_leaves_no_trace_and_a_probed_one_does(method):
    model = pruned(method=METHODS[method], prefill=2 * ids().shape[1])
    before = pruning_state(model)
    continued(model, ids()[:1])
    after = pruning_state(model)
    moving = [name for name in before if name != "batches"]
    assert all(torch.equal(before[name], after[name]) for name in moving)
    continued(model, ids())
    assert any(not torch.equal(before[name], pruning_state(model)[name]) for name in moving) or not moving


def test_griffins_statistic_is_that_of_a_loop():
    model = pruned(method=Griffin)
    dense, states = tiny("llama"), {}
    for layer in PRUNED:
        dense.model.layers[layer].mlp.down_proj.register_forward_pre_hook(
            lambda m, args, layer=layer: states.update({layer: args[0].detach().double()})
        )
    with torch.no_grad():
        dense(input_ids=ids()[:, :PROMPT])
    continued(model, ids())
    for layer in PRUNED:
        total = torch.zeros(160, dtype=torch.float64)
        for row in states[layer]:
            for token in row:
                total += (token / token.norm()) ** 2
        expected = total.topk(len(kept_units(model)[layer].mlp)).indices.sort().values
        assert torch.equal(kept_units(model)[layer].mlp, expected)
        assert not len(kept_units(model)[layer].attention) or len(kept_units(model)[layer].attention) == HEADS


@pytest.mark.parametrize(
    ("name", "prefill", "method"),
    [("llama", "dense", "paper"), ("opt", "probe", "paper"), ("llama", "probe", "best"), ("opt", "dense", "griffin")],
)
class TestRefresh:
    EVERY = 4

    def model(self, name, prefill, method):
        return pruned(name, METHODS[method], prefill, refresh=self.EVERY)

    @torch.no_grad()
    def steps(self, model, text, cache):
        """Token by token: logits, and the channels that each ran on."""
        found, kept = [], []
        for place in range(PROMPT, text.shape[1]):
            out = model(input_ids=text[:, place : place + 1], past_key_values=cache, use_cache=True)
            found.append(out.logits)
            kept.append({layer: units.mlp.tolist() for layer, units in kept_units(model).items()})
        return torch.cat(found, 1), kept

    def begun(self, model, text):
        with torch.no_grad():
            return model(input_ids=text[:, :PROMPT], use_cache=True).past_key_values

    def test_channels_change_every_so_many_tokens_and_heads_do_not(self, name, prefill, method):
        model = self.model(name, prefill, method)
        cache = self.begun(model, ids())
        heads = {layer: units.attention.tolist() for layer, units in kept_units(model).items()}
        start = {layer: units.mlp.tolist() for layer, units in kept_units(model).items()}
        _, kept = self.steps(model, ids(), cache)
        assert kept[: self.EVERY] == [start] * self.EVERY
        assert kept[self.EVERY] != start
        assert kept[self.EVERY : 2 * self.EVERY] == [kept[self.EVERY]] * self.EVERY
        assert {layer: units.attention.tolist() for layer, units in kept_units(model).items()} == heads

    def test_pieces_of_the_same_size_give_the_same(self, name, prefill, method):
        text = ids()
        one, other = self.model(name, prefill, method), self.model(name, prefill, method)
        expected, _ = self.steps(one, text, self.begun(one, text))
        cache, found = self.begun(other, text), []
        with torch.no_grad():
            for start in range(PROMPT, text.shape[1], self.EVERY):
                piece = text[:, start : start + self.EVERY]
                found.append(other(input_ids=piece, past_key_values=cache, use_cache=True).logits)
        torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-4)

    def test_branches_go_on_by_themselves(self, name, prefill, method):
        model, text, other = self.model(name, prefill, method), ids(), ids(seed=9)
        other[:, : PROMPT + 2] = text[:, : PROMPT + 2]
        with frozen_history(model):
            alone = [self.steps(model, one, self.begun(model, one))[0] for one in (text, other)]
            cache = self.begun(model, text)
            with torch.no_grad():
                model(input_ids=text[:, PROMPT : PROMPT + 2], past_key_values=cache, use_cache=True)
            branch, found = copy.deepcopy(cache), ([], [])
            for place in range(PROMPT + 2, text.shape[1]):
                for into, one, own in zip(found, (text, other), (cache, branch), strict=True):
                    with torch.no_grad():
                        out = model(input_ids=one[:, place : place + 1], past_key_values=own, use_cache=True)
                    into.append(out.logits)
        for into, expected in zip(found, alone, strict=True):
            torch.testing.assert_close(torch.cat(into, 1), expected[:, 2:], rtol=1e-4, atol=1e-4)


def test_refresh_chooses_by_the_tokens_since():
    # MLPs alone are pruned, in one layer: what enters it is the dense model's, so that a loop can say what is chosen.
    settings = {"pruning_ratio": 0.1, "skip_layers": (0, 1, 2, 3), "refresh": 4}
    model = pruned(method=lambda: ProbePruning(blocks=("mlp",), fusion_weight=1.0, score="energy"), **settings)
    text, seen, dense = ids(), [], tiny("llama")
    dense.model.layers[4].mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    with torch.no_grad():
        dense(input_ids=text)
        cache = model(input_ids=text[:, :PROMPT], use_cache=True).past_key_values
        for place in range(PROMPT, PROMPT + 5):
            model(input_ids=text[:, place : place + 1], past_key_values=cache, use_cache=True)
    energy = seen[0][:, PROMPT : PROMPT + 4].double().square().sum((0, 1))
    scores = energy * dense.model.layers[4].mlp.down_proj.weight.double().square().sum(0)
    kept = kept_units(model)[4].mlp
    assert torch.equal(kept, scores.topk(len(kept)).indices.sort().values)


def test_cropped_tokens_have_no_part_in_a_later_choice():
    text, kept = ids(), []
    for detour in (False, True):
        model = pruned(refresh=4)
        cache = TestRefresh().begun(model, text)
        with torch.no_grad():
            model(input_ids=text[:, PROMPT : PROMPT + 2], past_key_values=cache, use_cache=True)
            if detour:
                model(input_ids=ids(seed=5)[:, :1], past_key_values=cache, use_cache=True)
                cache.crop(-1)
            for place in range(PROMPT + 2, PROMPT + 5):
                model(input_ids=text[:, place : place + 1], past_key_values=cache, use_cache=True)
        kept.append(choices(kept_units(model)))
    assert kept[0] == kept[1]


def test_decoding_moves_no_state():
    model = pruned(refresh=2)
    cache = TestRefresh().begun(model, ids())
    before = pruning_state(model)
    TestRefresh().steps(model, ids(), cache)
    after = pruning_state(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_cannot_be_is_refused_in_one_line():
    for settings, reason in (
        ({"prefill": "sparse"}, "probe, dense, auto or a number"),
        ({"prefill": -1}, "must not be negative"),
        ({"refresh": 0}, "at least 1"),
    ):
        with pytest.raises(UserError, match=reason):
            pruned(**settings)
    with pytest.raises(UserError, match="leave prefill and refresh out"):
        pruned(method=WandaSP)
    model = pruned(refresh=3)
    with pytest.raises(UserError, match="leave it out"):
        model(input_ids=ids(), past_key_values=StaticCache(config=model.config, max_cache_len=40))


def test_memory_of_the_cache_is_that_of_the_kept_heads():
    for name, heads in (("llama", HEADS), ("llama_gqa", GROUPS)):
        model = pruned(name)
        cache = model(input_ids=ids(), use_cache=True).past_key_values
        assert [layer.keys.shape[1] for layer in cache.layers][:2] == [heads, heads]
        assert all(cache.layers[layer].keys.shape[1] < heads for layer in PRUNED)


def test_every_stock_architecture_generates_from_a_dense_prompt():
    for name in MODELS:
        model = pruned(name)
        text = model.generate(ids(2), max_new_tokens=5, do_sample=False, pad_token_id=0)
        first = tiny(name)(input_ids=ids(2)).logits[:, -1].argmax(-1)
        assert torch.equal(text[:, ids(2).shape[1]], first), "the first token is the dense model's"


@pytest.mark.parametrize("name", ["llama", "llama_gqa", "opt"])
@pytest.mark.parametrize("fixed", [False, True])
def test_what_is_put_back_is_the_mean_over_the_prompt(name, fixed):
    # A loop over a stock model: the prompt's mean of every channel that goes, through the output matrix, added to what
    # the kept ones give. Nothing is in front of the one layer that is pruned, so that its states are the dense model's.
    settings = {"pruning_ratio": 0.1, "skip_layers": (0, 1, 2, 3)}
    method = lambda: ProbePruning(blocks=("mlp",), compensation="probe", score="centered")  # noqa: E731
    model, dense, text = pruned(name, method, **settings), tiny(name), ids()
    cache = StaticCache(config=model.config, max_cache_len=40) if fixed else None
    found = continued(model, text, cache=cache)
    kept = kept_units(model)[4].mlp
    output = blocks_of(dense)[4, Block.MLP].projection(blocks_of(dense)[4, Block.MLP].output)
    removed = torch.ones(output.in_features, dtype=torch.bool).index_fill(0, kept, False)

    def with_means(module, args):
        states = args[0].reshape(*text.shape, -1).clone()
        states[:, PROMPT:, removed] = states[:, :PROMPT, removed].mean((0, 1))
        return (states.reshape(args[0].shape),)

    output.register_forward_pre_hook(with_means)
    with torch.no_grad():
        expected = dense(input_ids=text).logits
    torch.testing.assert_close(found[1], expected[:, PROMPT:], rtol=1e-4, atol=2e-5)
