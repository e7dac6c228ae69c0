"""Several conversations on one model: each goes on under its own choice, whatever the others do."""

import copy
import gc
import pickle
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import StaticCache

from pp_lightning import (
    UserError,
    compile_,
    frozen_history,
    load_pruning_state,
    prune_,
    pruning_state,
    skipped_batches,
    unprune_,
)
from pp_lightning.methods import FullBatchProbing, ProbePruning
from pp_lightning.pruning import pruning_of
from tests.models import SETTINGS, held_by, ids, logits, statistics, tiny

METHODS = {"paper": ProbePruning, "best": ProbePruning.best}
LENGTH = 30  # tokens of a conversation, at most


def pruned(name="llama_gqa", method=ProbePruning, **settings):
    model = tiny(name)
    prune_(model, method(), statistics(name), **{**SETTINGS, **settings})
    model.generation_config.eos_token_id = None
    return model


def bytes_held(model):
    return pruning_of(model).context.held.nbytes


def bytes_of_one(model):
    slices = [block.runner.slices for block in pruning_of(model).pruners.values()]
    return sum(one.size * one.like.element_size() for one in slices)


class Talk:
    """One conversation: what was said in it, and the logits that the model answered with."""

    def __init__(self, model, static):
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=LENGTH) if static else None
        self.steps, self.logits, self.length = [], [], 0

    def say(self, text):
        """Begin, or go on, with tokens (1, S)."""
        given = {} if self.cache is None else {"past_key_values": self.cache}
        out = self.model(input_ids=text, use_cache=True, **given)
        self.cache, self.length = out.past_key_values, self.length + text.shape[1]
        self.steps.append(("say", text))
        self.logits.append(out.logits[:, -1])

    def crop(self, tokens):
        """Take back the last ones."""
        self.cache.crop(-tokens)
        self.length -= tokens
        self.steps.append(("crop", tokens))

    def branch(self):
        """Another conversation that begins like this one."""
        other = copy.copy(self)
        other.cache, other.steps, other.logits = copy.deepcopy(self.cache), list(self.steps), list(self.logits)
        return other

    @property
    def is_full(self):
        return self.length > LENGTH - 4


def at_random(model, static, can_crop, conversations, number, choose):
    """Conversations that are begun, continued, branched, cropped and dropped at random; after every step all of them,
    those that ended too."""
    talks, ended = [], []
    for step in range(number):
        going = [talk for talk in talks if not talk.is_full]
        what = choose.random()
        if len(talks) < conversations and (not going or what < 0.2):
            talks.append(Talk(model, static))
            talks[-1].say(ids(1, choose.randint(8, 20), seed=step))
        elif not going or what < 0.3:
            ended.append(talks.pop(choose.randrange(len(talks))))
            ended[-1].cache = None
        elif what < 0.4 and len(talks) < conversations:
            talks.append(choose.choice(going).branch())
        elif what < 0.5 and can_crop:
            choose.choice(going).crop(2)
        else:
            choose.choice(going).say(ids(1, choose.choice([1, 1, 3]), seed=1000 + step))
        yield [*talks, *ended]


def interleave(name, method, static, conversations, steps, held_slices):
    model, alone = (pruned(name, METHODS[method], held_slices=held_slices) for _ in range(2))
    bound, highest = held_slices * bytes_of_one(model), 0
    with torch.no_grad(), frozen_history(model), frozen_history(alone):
        plain = not static and getattr(model.config, "sliding_window", None) is None
        for talks in at_random(model, static, plain, conversations, steps, random.Random(7)):
            held = [one.cache.pruning_choice for one in talks if one.cache is not None and held_by(one.cache)]
            assert len({id(one) for one in held}) <= held_slices
            highest = max(highest, bytes_held(model))
        assert highest == bound, "the bound was reached, and kept"
        for talk in talks:
            again = Talk(alone, static)
            for what, value in talk.steps:
                getattr(again, what)(value)
            for found, expected in zip(talk.logits, again.logits, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    return talks


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", ["llama_gqa", "opt"])
def test_conversations_side_by_side(name, static):
    talks = interleave(name, "paper", static, conversations=4, steps=60, held_slices=2)
    assert {what for talk in talks for what, _ in talk.steps} == ({"say"} if static else {"say", "crop"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method", "static"),
    [
        ("llama_gqa", "paper", False),
        ("llama_gqa", "best", True),
        ("gemma3_text", "paper", True),
        ("gemma3_text", "best", False),
        ("opt", "best", False),
    ],
)
def test_twenty_conversations(name, method, static):
    talks = interleave(name, method, static, conversations=20, steps=300, held_slices=3)
    assert len(talks) > 20


@torch.no_grad()
def test_each_has_its_own_choice():
    """Negative control: the choices do differ, and a conversation that ran on another's would show it."""
    model = pruned(held_slices=2)
    first, second = Talk(model, False), Talk(model, False)
    first.say(ids(1, 16, seed=1))
    second.say(ids(1, 16, seed=2))
    other = first.branch()
    other.cache.pruning_choice = second.cache.pruning_choice
    for talk in (first, other):
        talk.say(ids(1, 1))
    assert not torch.allclose(first.logits[-1], other.logits[-1], atol=1e-3)


@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_a_cache_in_a_file_goes_on(static):
    model = pruned()
    talk = Talk(model, static)
    talk.say(ids(1, 12))
    again = copy.copy(talk)
    again.cache, again.steps, again.logits = pickle.loads(pickle.dumps(talk.cache)), [], []
    for one in (talk, again):
        one.say(ids(1, 1))
    assert torch.equal(talk.logits[-1], again.logits[-1])
    if static:
        again.cache.reset()
        assert (again.cache.pruning_choice, talk.cache.pruning_choice is None) == (None, False)


@torch.no_grad()
def test_a_cache_that_is_gone_frees_its_slices():
    model = pruned(held_slices=3)
    talks = [Talk(model, False) for _ in range(3)]
    for seed, talk in enumerate(talks):
        talk.say(ids(1, 12, seed=seed))
        talk.say(ids(1, 1))
    assert bytes_held(model) == 3 * bytes_of_one(model)
    del talk, talks
    gc.collect()
    assert bytes_held(model) == bytes_of_one(model)  # for the next one, which needs no fresh memory then
    unprune_(model)


def test_the_bound_is_a_number_or_bytes():
    size = bytes_of_one(pruned())
    assert pruning_of(pruned(held_slices=f"{2.5 * size}B")).context.held.most == 2
    for wrong, message in (
        (0, "at least 1 conversation, not 0"),
        ("many", "a number of conversations, or bytes as in 2GB, not 'many'"),
        ("1KB", "held_slices=1KB is less than one conversation takes: "),
    ):
        model = tiny("llama")
        with pytest.raises(UserError, match=message):
            prune_(model, ProbePruning(), statistics("llama"), **SETTINGS, held_slices=wrong)
        assert not any("pruner" in name for name, _ in model.named_modules())


class TestCopies:
    """A copy of the model goes on with the original's caches as long as it has the same weights."""

    @torch.no_grad()
    def test_with_the_same_weights(self):
        model = pruned()
        talk, twin = Talk(model, False), copy.deepcopy(model)
        talk.say(ids(1, 12))
        there = talk.branch()
        there.model = twin
        for one in (talk, there):
            one.say(ids(1, 1, seed=3))
        assert torch.equal(talk.logits[-1], there.logits[-1])

    @torch.no_grad()
    def test_with_other_weights(self):
        model = pruned()
        twin = copy.deepcopy(model)
        twin.model.layers[3].mlp.up_proj.weight.mul_(1.01)
        talk, there = Talk(model, False), Talk(twin, False)
        for one in (talk, there):
            one.say(ids(1, 12))
        talk.model, there.model = there.model, talk.model
        for one in (talk, there):
            with pytest.raises(UserError, match="belongs to another model or pruning"):
                one.say(ids(1, 1))


def in_threads(model, number, work):
    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(lambda index: work(model, index), range(number)))


def forwards(times):
    def work(model, index):
        return [logits(model, ids(2, 10 + index, seed=100 * index + one)) for one in range(times)]

    return work


def generations(times):
    def work(model, index):
        given = {"max_new_tokens": 4, "do_sample": False}
        return [model.generate(ids(2, 10 + index, seed=100 * index + one), **given) for one in range(times)]

    return work


class TestThreads:
    """Threads get what they would get one after another. With histories that move this depends on their order."""

    def check(self, model, number, work):
        with frozen_history(model):
            found = in_threads(model, number, work)
            expected = [work(model, index) for index in range(number)]
        for one, other in zip(found, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    @pytest.mark.parametrize("name", ["llama_gqa", "opt", "phi3"])
    @pytest.mark.parametrize("work", [forwards(4), generations(2)])
    def test_a_few(self, name, work):
        self.check(pruned(name, held_slices=2), 4, work)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "method", "work"),
        [
            ("opt", "best", forwards(50)),
            ("llama_gqa", "paper", generations(5)),
            ("gemma3_text", "best", generations(5)),
        ],
    )
    def test_eight(self, name, method, work):
        self.check(pruned(name, METHODS[method], held_slices=2), 8, work)

    @pytest.mark.slow
    def test_compiled_layers(self, only_traced):
        model = pruned("llama_gqa", held_slices=2)
        compile_(model)
        with frozen_history(model):
            for work in (forwards(3), generations(2)):
                self.check(model, 3, work)

    def test_histories_move_by_whole_batches(self):
        """With momentum one half, and choices that do not depend on the history, each order gives other histories: one
        of the orders of three batches is what three threads leave, in all blocks alike."""
        batches = [ids(2, 12, seed=seed) for seed in range(3)]
        left = []
        for order in ([0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]):
            model = pruned(method=lambda: ProbePruning(fusion_weight=1.0, momentum=0.5))
            for index in order:
                logits(model, batches[index])
            left.append(pruning_state(model))
        assert not torch.equal(left[0]["history.3.mlp"], left[1]["history.3.mlp"])
        model = pruned(method=lambda: ProbePruning(fusion_weight=1.0, momentum=0.5))
        in_threads(model, 3, lambda model, index: logits(model, batches[index]))
        found = pruning_state(model)
        assert any(all(torch.allclose(found[name], one[name]) for name in found) for one in left)


class TestState:
    """What a later batch's choice depends on is in the state, and moves when a batch has ended."""

    @pytest.mark.parametrize("method", ["paper", "best"])
    def test_taken_and_put_back(self, method):
        model, other = pruned(method=METHODS[method]), pruned(method=METHODS[method])
        for seed in (1, 2):
            logits(model, ids(seed=seed))
        state = pruning_state(model)
        expected = [logits(model, ids(seed=seed)) for seed in (3, 4)]
        load_pruning_state(other, state)
        assert all(torch.equal(logits(other, ids(seed=seed)), one) for seed, one in zip((3, 4), expected, strict=True))
        load_pruning_state(model, state)
        assert torch.equal(logits(model, ids(seed=3)), expected[0])
        assert not torch.equal(logits(model, ids(seed=3)), expected[0]), "it has moved"

    def test_in_a_file(self, tmp_path):
        model = pruned(method=ProbePruning.best)
        logits(model, ids())
        save_file(pruning_state(model), tmp_path / "state.safetensors")
        state, read = pruning_state(model), load_file(tmp_path / "state.safetensors")
        assert state.keys() == read.keys() and all(torch.equal(state[name], read[name]) for name in state)

    def test_of_another_method_is_refused(self):
        model = pruned(method=FullBatchProbing)
        before = pruning_state(model)
        with pytest.raises(UserError, match=r"this state is of another model or method: .* does not fit"):
            load_pruning_state(model, pruning_state(pruned()))
        assert pruning_state(model).keys() == before.keys()

    @pytest.mark.parametrize("method", ["paper", "best"])
    def test_a_batch_that_fails_moves_nothing(self, method):
        model = pruned(method=METHODS[method])
        before, last = pruning_state(model), model.model.layers[-1]
        hook = last.register_forward_pre_hook(lambda *_: 1 / 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                logits(model, ids(seed=2))
        hook.remove()
        after = pruning_state(model)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert torch.equal(logits(model, ids()), logits(pruned(method=METHODS[method]), ids()))

    @pytest.mark.parametrize(
        ("compensation", "compiled"),
        [(None, False), ("history", False), pytest.param("history", True, marks=pytest.mark.slow)],
    )
    def test_a_batch_that_is_not_finite_moves_nothing(self, compensation, compiled):
        """An overflow in the third layer: the first two saw nothing of it, and do not move either."""
        model, spared = (pruned(method=lambda: ProbePruning(compensation=compensation)) for _ in range(2))
        if compiled:
            compile_(model)
            compile_(spared)
        for one in (model, spared):
            logits(one, ids(seed=1))
        before, layer = pruning_state(model), model.model.layers[3]
        hook = layer.register_forward_pre_hook(lambda _, args: (args[0] * float("inf"), *args[1:]))
        with pytest.warns(RuntimeWarning, match="a batch was not finite"):
            logits(model, ids(seed=2))
        hook.remove()
        after = pruning_state(model)
        assert all(torch.equal(before[name], after[name]) for name in before if name != "batches")
        for seed in range(3, 8):
            assert torch.equal(logits(model, ids(seed=seed)), logits(spared, ids(seed=seed)))
        assert (skipped_batches(model), skipped_batches(spared)) == (1, 0)
