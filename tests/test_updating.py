"""Weights that take over what went: against a naive loop, on planted copies, on other text, and in between."""

import argparse
import inspect
import math

import pytest
import torch

import pp_lightning.updating as updating_module
from pp_lightning import calibrate, prune_, unprune_
from pp_lightning.blocks import AttentionUnit, Block, units_of
from pp_lightning.checkpoints import load_model, load_tokenizer
from pp_lightning.data import Embedded, LanguageModelling
from pp_lightning.errors import UserError
from pp_lightning.families import blocks_of, layers_of, shape_of
from pp_lightning.functional.least_squares import (
    SecondMoments,
    columns_in_order,
    losses_in_order,
    ordered_factor,
    solve_kept,
    squared_error,
)
from pp_lightning.layerwise import LayerByLayer
from pp_lightning.methods import FLAP, METHODS, ProbePruning, StaticBest, StaticPPsp, Updated, WandaSP, method_named
from pp_lightning.pruning import is_pruned, pruning_of
from pp_lightning.updating import LeastSquares
from tests.models import FAMILIES, SETTINGS, calibration_batches, ids, logits, padded, statistics, tiny


@torch.no_grad()
def naive(model, batches, choices, ridge, bias):
    """Least squares on stacked rows, one block after the other, each on a run of the whole model; in place."""
    for key, kept in choices.items():
        block, rows = blocks_of(model)[key], []
        layer, residuals, states = layers_of(model)[key[0]], [], []
        projection = block.projection(block.output)
        hooks = [
            layer.register_forward_pre_hook(lambda _, args, found=residuals: found.append(args[0])),
            projection.register_forward_pre_hook(lambda _, args, found=states: found.append(args[0])),
        ]
        for batch in batches:
            model(**batch, use_cache=False)
        for hook in hooks:
            hook.remove()
        for residual, state in zip(residuals, states, strict=True):
            rows.append((state / residual.norm(dim=-1, keepdim=True)).flatten(0, 1))
        x = torch.cat(rows)
        mean = x.mean(0) if bias else torch.zeros_like(x[0])
        x = x - mean
        size = x.square().mean()
        y = x @ projection.weight.t()
        ones = (ridge * size * len(x)).sqrt() * torch.eye(len(kept), dtype=x.dtype)
        a, target = torch.cat([x[:, kept], ones]), torch.cat([y, ones @ projection.weight[:, kept].t()])
        new = torch.zeros_like(projection.weight)
        new[:, kept] = torch.linalg.lstsq(a, target, driver="gelsd").solution.t()
        if bias:
            offset = (projection.weight - new) @ mean
            old = torch.zeros_like(offset) if projection.bias is None else projection.bias
            projection.bias = torch.nn.Parameter(old + offset)
        projection.weight.copy_(new)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["llama", "llama_gqa", "gemma3_text"])
def test_equals_a_naive_loop_in_double_precision(name, bias):
    model, batches = tiny(name).double(), calibration_batches()
    expected, widths = tiny(name).double(), {}
    for key, block in blocks_of(model).items():
        widths[key] = block.output_weight.shape[1]
    stats = calibrate(model, batches, progress=False)
    prune_(model, WandaSP(), stats, **SETTINGS, update=LeastSquares(batches, ridge=1e-3, bias=bias))
    choices = {}
    for key, kept in pruning_of(model).choices.items():
        width = widths[key] // blocks_units(name, key)
        if len(kept) * width < widths[key]:
            choices[key] = (kept[:, None] * width + torch.arange(width)).flatten()
    assert choices
    # a batch that is held out when the ridge is searched is held out here too: nothing is fitted to it
    naive(expected, batches[:-1], choices, 1e-3, bias)
    text = ids()
    torch.testing.assert_close(logits(model, text), logits(expected, text), rtol=1e-6, atol=1e-6)


def blocks_units(name, key):
    shape = shape_of(tiny(name).config)
    return units_of(shape, key[1], AttentionUnit.default_for(shape)).number


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_copies_of_channels_and_heads_are_lost_for_nothing(name):
    """Half of the units of a block are copies of the other half, with output columns of their own."""
    model = tiny(name)
    with torch.no_grad():
        for block in blocks_of(model).values():
            for module in (block.projection(n) for n in block.inputs):
                half = len(module.weight) // 2
                module.weight[half:] = module.weight[:half]
                if module.bias is not None:
                    module.bias[half:] = module.bias[:half]
    batches = calibration_batches(8)
    stats, text = calibrate(model, batches, progress=False), ids()
    dense = logits(model, text)

    class FirstHalf(StaticPPsp):
        def unit_scores(self, block, calibration_data):
            return -torch.arange(float(block.units.number))

    asked = {"pruning_ratio": 0.5, "skip_layers": (), "round_to": 16}
    prune_(model, FirstHalf(), stats, **asked)
    without = (logits(model, text) - dense).abs().max()
    unprune_(model)
    prune_(model, FirstHalf(), stats, **asked, update=LeastSquares(batches, ridge=1e-9))
    assert (logits(model, text) - dense).abs().max() < 2e-3 < 0.05 < without


@pytest.mark.parametrize("name", list(FAMILIES))
def test_batches_go_layer_by_layer_through_every_family(name):
    model, batches = tiny(name), [padded(ids(), left=3), {"input_ids": ids(2, 17, seed=3)}]
    ends = []
    hook = layers_of(model)[-1].register_forward_hook(lambda _, __, out: ends.append(out))
    with torch.no_grad():
        for batch in batches:
            model.base_model(**batch, use_cache=False)
        hook.remove()
        carried = LayerByLayer(model, batches)
        for _ in layers_of(model):
            carried.advance()
    for end, hidden in zip(ends, map(carried.hidden, range(len(carried))), strict=True):
        assert torch.equal(end[0] if isinstance(end, tuple) else end, hidden)
    assert all("forward" not in vars(layer) for layer in layers_of(model))


def test_padding_is_left_out():
    model, text = tiny("llama"), ids()
    stats = statistics("llama")
    for batches in ([{"input_ids": text}] * 2, [padded(text, left=5)] * 2):
        prune_(model, WandaSP(), stats, **SETTINGS, update=LeastSquares(batches, ridge=1e-2))
        found = logits(model, text)
        unprune_(model)
        if batches[0].get("attention_mask") is None:
            expected = found
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_states_on_disk_give_the_same_and_a_second_run_goes_on(tmp_path, monkeypatch):
    solved = []
    real = solve_kept
    monkeypatch.setattr(updating_module, "solve_kept", lambda *args: solved.append(1) or real(*args))
    batches, text, results = calibration_batches(), ids(), []
    for folder in (None, tmp_path, tmp_path):
        model = tiny("llama")
        prune_(model, WandaSP(), statistics("llama"), **SETTINGS, update=LeastSquares(batches, folder=folder))
        results.append((logits(model, text), len(solved)))
        solved.clear()
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][0], results[2][0])
    assert [count for _, count in results] == [6, 6, 0]
    other = LeastSquares(batches, ridge=1e-2, folder=tmp_path)  # other settings: nothing is taken over
    prune_(model := tiny("llama"), WandaSP(), statistics("llama"), **SETTINGS, update=other)
    assert len(solved) == 6


def test_an_interruption_leaves_the_model_dense_and_what_is_finished_on_disk(tmp_path, monkeypatch):
    model, text, batches = tiny("llama"), ids(), calibration_batches()
    dense, real, calls = logits(model, text), solve_kept, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(updating_module, "solve_kept", dies)
    asked = {"pruning_ratio": 0.4, "skip_layers": (0, 1), "round_to": 16}
    with pytest.raises(KeyboardInterrupt):
        prune_(model, WandaSP(), statistics("llama"), **asked, update=LeastSquares(batches, folder=tmp_path))
    assert not is_pruned(model) and torch.equal(logits(model, text), dense)
    calls.clear()
    monkeypatch.setattr(updating_module, "solve_kept", lambda *args: calls.append(1) or real(*args))
    prune_(model, WandaSP(), statistics("llama"), **asked, update=LeastSquares(batches, folder=tmp_path))
    assert len(calls) == 3  # of six blocks


def test_a_ranking_over_layers_counts_what_is_lost_after_the_update():
    """Where half of one block's units are copies, they go first."""
    model = tiny("llama")
    with torch.no_grad():
        block = blocks_of(model)[3, Block.MLP]
        for name in block.inputs:
            weight = block.projection(name).weight
            weight[80:] = weight[:80]
    batches = calibration_batches()
    stats = calibrate(model, batches, progress=False)
    asked = {"pruning_ratio": 0.2, "skip_layers": (0, 1), "round_to": 16}
    keep = {}
    for updates in (False, True):
        update = LeastSquares(batches, ridge=1e-3) if updates else None
        prune_(model, StaticPPsp(), stats, **asked, allocation="global", update=update)
        keep[updates] = dict(pruning_of(model).keep)
        unprune_(model)
    assert keep[True][3, Block.MLP] <= 96 < keep[False][3, Block.MLP]


def test_one_factor_gives_losses_and_columns_of_every_count():
    torch.manual_seed(0)
    mix, weight = torch.randn(12, 12, dtype=torch.float64), torch.randn(5, 12, dtype=torch.float64)
    moments = mix @ mix.t()
    order = torch.randperm(12)
    factor = ordered_factor(moments, order, 0.0)
    losses = losses_in_order(weight, order, factor)
    for count in range(1, 12):
        kept = order[:count].sort().values
        (columns,) = solve_kept(weight, moments, kept, [0.0])
        in_order = columns_in_order(weight, order, factor, count)
        torch.testing.assert_close(in_order[:, order[:count].argsort()], columns, rtol=1e-8, atol=1e-8)
        lost = weight.index_add(1, kept, columns, alpha=-1.0)
        assert math.isclose(float((lost @ moments @ lost.t()).trace()), float(losses[count:].sum()), rel_tol=1e-8)


def test_moments_and_errors_are_what_they_say():
    states, weight = torch.randn(50, 6), torch.randn(3, 6)
    moments = SecondMoments(6, states.device)
    for part in states.split(7):
        moments.add(part)
    wide = states.double()
    torch.testing.assert_close(moments.matrix(), wide.t() @ wide / 50, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moments.matrix(about_mean=True), wide.t().cov(correction=0), rtol=1e-6, atol=1e-6)
    kept, columns, bias = torch.tensor([1, 4]), torch.randn(3, 2), torch.randn(3)
    expected = (states @ weight.t() - states[:, kept] @ columns.t() - bias).square().sum()
    assert math.isclose(squared_error(weight, columns, kept, states, bias), float(expected), rel_tol=1e-5)


def test_any_static_choice_can_be_updated():
    for label in ("ppsp_updated", "flap_updated", "wanda_sp_updated"):
        method = method_named(label)
        assert isinstance(method, Updated) and method.updates and method.label == label
        assert method.settings()["update"] == "least_squares"
        model = tiny("llama")
        prune_(model, method, statistics("llama"), **SETTINGS, update=LeastSquares(calibration_batches()))
        assert pruning_of(model).updated
    assert METHODS["static_best"] is StaticBest
    uniform = Updated(FLAP()).with_uniform_counts()
    assert not uniform.allocates and uniform.origin.uniform


@pytest.mark.parametrize(
    ("method", "update", "words"),
    [
        (StaticBest(), None, "pass update"),
        (ProbePruning(), LeastSquares(calibration_batches()), "leave update out"),
        (WandaSP(), LeastSquares(calibration_batches(), ridge=-1.0), "must not be negative"),
    ],
)
def test_mistakes_are_one_line_and_leave_the_model_as_it_was(method, update, words):
    model, text = tiny("llama"), ids()
    dense = logits(model, text)
    with pytest.raises(UserError, match=words) as caught:
        prune_(model, method, statistics("llama"), **SETTINGS, update=update)
    assert "\n" not in str(caught.value)
    assert not is_pruned(model) and torch.equal(logits(model, text), dense)


def test_an_update_without_text_is_refused():
    with pytest.raises(UserError, match="needs calibration batches"):
        LeastSquares([])


def test_a_class_is_no_method():
    with pytest.raises(UserError, match=r"such as FLAP\(\)"):
        prune_(tiny("llama"), FLAP, statistics("llama"), **SETTINGS)


def test_a_single_batch_is_told_to_hold_nothing_out():
    for number, said in ((1, True), (4, False)):
        model, told, batches = tiny("llama"), [], calibration_batches(number)
        prune_(model, StaticBest(), statistics("llama"), **SETTINGS, update=LeastSquares(batches, tell=told.append))
        assert any("leaves nothing held out" in line for line in told) == said


def test_states_that_are_not_finite_or_all_zero_are_refused():
    model = tiny("llama")
    stats, batches = statistics("llama"), calibration_batches()
    with torch.no_grad():
        layers_of(model)[3].mlp.up_proj.weight.fill_(0.0)  # the fingerprint samples it: make the statistics fit
        stats.model = updating_module.fingerprint(model)
        with pytest.raises(UserError, match="singular"):
            prune_(model, WandaSP(), stats, **SETTINGS, update=LeastSquares(batches))
        assert not is_pruned(model)
        layers_of(model)[3].mlp.up_proj.weight.fill_(float("inf"))
        stats.model = updating_module.fingerprint(model)
        with pytest.raises(UserError, match="not finite"):
            prune_(model, WandaSP(), stats, **SETTINGS, update=LeastSquares(batches))
    assert not is_pruned(model)


@pytest.mark.slow
def test_shuffled_tokens_of_another_text_make_it_worse():
    """Negative control: the same choice, updated on text that has nothing of the model's own."""
    model, tokenizer = load_model(), load_tokenizer()
    own = windows_of(Embedded("calibration"), tokenizer)
    source = torch.tensor(tokenizer(inspect.getsource(argparse)).input_ids)
    shuffled = source[torch.randperm(len(source), generator=torch.Generator().manual_seed(0))][: 32 * 256]
    other = [{"input_ids": rows} for rows in shuffled.view(-1, 8, 256)]
    stats, losses = calibrate(model, own, progress=False), {}
    text = windows_of(Embedded("test"), tokenizer)[0]["input_ids"]
    for name, batches in (("own", own), ("other", other), ("none", None)):
        update = None if batches is None else LeastSquares(batches)
        prune_(model, StaticPPsp(), stats, pruning_ratio=0.4, round_to=16, update=update)
        with torch.no_grad():
            losses[name] = float(model(text, labels=text).loss)
        unprune_(model)
    assert losses["own"] < losses["none"] - 0.05 and losses["none"] < losses["other"]


def windows_of(text, tokenizer):
    data = LanguageModelling(text=text, window=256, batch_size=8, limit_tokens=8192)
    data.use_tokenizer(tokenizer)
    return [{"input_ids": batch["input_ids"]} for batch in data.test_batches()]


def test_few_tokens_for_many_channels_are_told():
    lines = []
    prune_(
        tiny("llama"),
        WandaSP(),
        statistics("llama"),
        **SETTINGS,
        update=LeastSquares([{"input_ids": ids(1, 20)}] * 2, tell=lines.append),
    )
    assert any("are few" in line for line in lines)
