"""Compiled layers: full graphs, one for all layers of a shape, that choose, compute and remember what eager ones do."""

import copy

import pytest
import torch
from transformers import StaticCache

from pp_lightning import UserError, calibrate, compile_, kept_units, prune_, uncompile_, unprune_
from pp_lightning.methods import FLAP, FullBatchProbing, ProbePruning, StaticPPsp
from pp_lightning.pruning import is_pruned
from tests.models import (
    SETTINGS,
    calibration_batches,
    choices,
    held_by,
    histories,
    ids,
    logits,
    padded,
    plant,
    pruned_blocks,
    ragged,
    statistics,
    tiny,
)

PROBE = {"row_ratio": 0.3}


def pair(name, method=None, mode="default", **settings):
    """The same model pruned twice, the second one compiled."""
    eager, compiled = tiny(name), tiny(name)
    if method is not None:
        for model in (eager, compiled):
            needed = statistics(name) if method.needs_statistics else None
            prune_(model, method, needed, **{**SETTINGS, **settings})
    return eager, compiled, compile_(compiled, mode=mode)


@torch.inference_mode()
def agree(eager, compiled, batch):
    """Same choices, logits within 1e-5, same histories."""
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    expected, found = (model(**batch, use_cache=False).logits[real] for model in (eager, compiled))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if is_pruned(eager) and pruned_blocks(eager):
        assert choices(kept_units(compiled)) == choices(kept_units(eager))
        for key, history in histories(eager).items():
            torch.testing.assert_close(histories(compiled)[key], history, rtol=1e-5, atol=1e-6)


def test_one_graph_without_breaks():
    """What dynamo itself says about a layer's batch: one graph, no break. And it would say so of a break."""
    model = tiny("llama")
    prune_(model, ProbePruning(**PROBE), statistics("llama"), **SETTINGS)
    layer, seen = model.model.layers[3], {}
    stock = layer.forward

    def explain(*arguments, **named):
        seen["result"] = torch._dynamo.explain(stock)(*arguments, **named)
        return stock(*arguments, **named)

    layer.forward = explain
    with torch.inference_mode():
        model(input_ids=ids(), use_cache=False)
    assert (seen["result"].graph_count, seen["result"].graph_break_count) == (1, 0)

    def broken(x):
        return x * 2 if x.sum() > 0 else x

    assert torch._dynamo.explain(broken)(torch.ones(2)).graph_break_count > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_batches_of_one_shape_and_all_layers_share_one_graph(only_traced, name):
    eager, compiled, compilation = pair(name, ProbePruning(**PROBE))
    agree(eager, compiled, {"input_ids": ids(seed=0)})
    made = len(compilation.graphs)
    assert made == 2, "one for the pruned layers, one for the skipped ones"
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (1, 2, 3):
            agree(eager, compiled, {"input_ids": ids(seed=seed)})
    assert len(compilation.graphs) == made
    assert compilation.seconds > 0


def test_graphs_are_counted_when_dynamo_has_forgotten_them(only_traced):
    """It remembers a limited number of compilations, those of others included."""
    _, compiled, compilation = pair("llama", ProbePruning(**PROBE))
    with torch.inference_mode():
        compiled(input_ids=ids(), use_cache=False)
    torch._dynamo.utils.clear_compilation_metrics()
    assert len(compilation.graphs) == 2


@pytest.mark.slow
def test_compiled_equals_eager():
    """For this machine, padding too; tests/test_families.py traces every kind of layer."""
    eager, compiled, _ = pair("qwen3", ProbePruning(**PROBE))
    for batch in (
        {"input_ids": ids(seed=1)},
        {"input_ids": ids(seed=2)},
        padded(ids(seed=3), left=3),
        padded(ids(seed=4), left=3),
    ):
        agree(eager, compiled, batch)


METHODS = {
    "query_head": ProbePruning(attention_unit="query_head", **PROBE),
    "parallel": ProbePruning(probe_source="previous", **PROBE),
    "full_batch": FullBatchProbing(),
    "static": StaticPPsp(),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_other_methods_compile_too(only_traced, method):
    eager, compiled, _ = pair("llama_gqa", METHODS[method])
    for seed in (1, 2):
        agree(eager, compiled, {"input_ids": ids(seed=seed)})


@pytest.mark.slow
def test_the_best_settings_compile_for_this_machine():
    eager, compiled, _ = pair("llama_gqa", ProbePruning.best())
    for seed in (1, 2):
        agree(eager, compiled, {"input_ids": ids(seed=seed)})


@pytest.mark.slow
def test_other_sizes_share_one_more_graph(only_traced):
    eager, compiled, compilation = pair("llama", ProbePruning(**PROBE))
    agree(eager, compiled, {"input_ids": ids(4, 24)})
    made = len(compilation.graphs)
    agree(eager, compiled, {"input_ids": ids(5, 22)})
    assert len(compilation.graphs) == made + 2, "one for pruned layers and one for skipped ones"
    agree(eager, compiled, {"input_ids": ids(6, 28)})
    assert len(compilation.graphs) == made + 2
    assert compilation.as_dict()["graphs"] == made + 2


@pytest.mark.slow
def test_layers_of_different_widths_share_graphs(only_traced):
    eager, compiled, compilation = pair("llama", FLAP(), round_to=1)
    agree(eager, compiled, {"input_ids": ids(seed=1)})
    shapes = {
        tuple(weight.shape for weight in layer.parameters()) for layer in compiled.model.layers if layer is not None
    }
    assert len(shapes) > 3
    made = len(compilation.graphs)
    agree(eager, compiled, {"input_ids": ids(seed=2)})
    assert len(compilation.graphs) == made


@pytest.mark.slow
def test_half_precision_keeps_what_eager_keeps():
    """Units that matter in any precision: rounding differs between the two, and decides where scores are close.

    Each rounds in its own way, so both are held against float32: compiling adds nothing to the error.
    """
    exact, eager, compiled = (plant(tiny("llama"))[0].bfloat16() for _ in range(3))
    for model in (exact.float(), eager, compiled):
        stats = calibrate(model, calibration_batches(), progress=False)
        prune_(model, ProbePruning(**PROBE), stats, **SETTINGS)
    compile_(compiled)
    for seed in (1, 2):
        with torch.inference_mode():
            expected, *found = (m(ids(seed=seed), use_cache=False).logits.float() for m in (exact, eager, compiled))
        assert choices(kept_units(exact)) == choices(kept_units(eager)) == choices(kept_units(compiled))
        of_eager, of_compiled = ((one - expected).norm() / expected.norm() for one in found)
        assert of_compiled < 1.2 * of_eager < 0.1
    assert all(history.dtype == torch.float32 for history in histories(compiled).values())


@pytest.mark.parametrize(("mode", "steps"), [("default", 0), ("reduce-overhead", 1), ("max-autotune", 1)])
@pytest.mark.parametrize("method", [None, ProbePruning(**PROBE)], ids=["dense", "pruned"])
def test_recorded_graphs_are_told_where_a_forward_pass_begins(monkeypatch, mode, steps, method):
    """Otherwise each layer begins one, and takes its input, the output of the layer in front, for free memory."""
    begun = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    _, compiled, _ = pair("llama", method, mode)

    def steps_of(model):
        begun.clear()
        for layer in model.model.layers:
            layer.forward = lambda hidden_states, **_: hidden_states
        model(input_ids=ids(), use_cache=False)
        return len(begun)

    assert (steps_of(compiled), steps_of(copy.deepcopy(compiled))) == (steps, steps)
    uncompile_(compiled)
    assert steps_of(compiled) == 0


@pytest.mark.parametrize(
    ("mode", "exact", "dynamic"),
    [
        ("default", None, None),
        ("reduce-overhead", "reduce-overhead", None),
        ("max-autotune", "max-autotune", "max-autotune-no-cudagraphs"),
        ("max-autotune-no-cudagraphs", "max-autotune-no-cudagraphs", "max-autotune-no-cudagraphs"),
    ],
)
def test_graphs_of_many_sizes_are_not_recorded(monkeypatch, mode, exact, dynamic):
    """They would be once more, for every layer, with each new size."""
    modes = {}

    def told(function, **given):
        modes[given["dynamic"]] = given["mode"]
        return function

    monkeypatch.setattr(torch, "compile", told)
    logits(pair("llama", mode=mode)[1], ids())
    assert modes == {False: exact, True: dynamic}


def test_it_can_be_undone():
    dense, compiled, _ = pair("llama", ProbePruning(**PROBE))
    with pytest.raises(UserError, match="uncompile_ it first"):
        unprune_(compiled)
    with pytest.raises(UserError, match="compiled already"):
        compile_(compiled)
    uncompile_(compiled)
    with pytest.raises(UserError, match="compile_ it first"):
        uncompile_(compiled)
    unprune_(compiled)
    unprune_(dense)
    assert all("forward" not in vars(layer) for layer in compiled.model.layers)
    compile_(compiled)
    with pytest.raises(UserError, match="uncompile_ it first"):
        prune_(compiled, FullBatchProbing(), **SETTINGS)


@pytest.mark.slow
def test_compiled_prompts_leave_their_slices_for_decoding():
    eager, compiled, compilation = pair("opt", ProbePruning(**PROBE))
    settings = {"max_new_tokens": 6, "do_sample": False}
    for model in (eager, compiled):
        model.generate(ids(2, 12), **settings)
    made = len(compilation.graphs)
    for seed in (1, 2):
        prompt = ids(2, 12, seed)
        for model in (eager, compiled):
            one = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True}
            cache = model.generate(prompt, **one).past_key_values
            assert None not in held_by(cache)
        assert torch.equal(compiled.generate(prompt, **settings), eager.generate(prompt, **settings))
    assert len(compilation.graphs) == made + 1, "one more graph, for all layers"
    for key, history in histories(eager).items():
        torch.testing.assert_close(histories(compiled)[key], history, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("positioned", [False, True])
@pytest.mark.parametrize("tokens", [24, 40])
def test_padding_makes_no_new_graph(only_traced, positioned, tokens):
    """Batches of one shape, whatever their longest row. With 40 tokens they have more columns than positions."""
    eager, compiled, compilation = pair("llama", ProbePruning(**PROBE))
    for longest in (20, 15, 18):
        batch = ragged([longest, 4, 11], "left", longest)
        wide = {name: torch.nn.functional.pad(values, (tokens - longest, 0)) for name, values in batch.items()}
        if positioned:
            wide["position_ids"] = (wide["attention_mask"].cumsum(1) - 1).clamp(min=0)
        agree(eager, compiled, wide)
    assert len(compilation.graphs) == 2


@pytest.mark.parametrize("name", ["llama", "mistral", "opt"])
@pytest.mark.parametrize("method", [None, StaticPPsp()])
@torch.inference_mode()
def test_stock_layers_are_compiled_with_a_cache_too(only_traced, name, method):
    """Which is what calling a model means where nobody says ``use_cache=False``."""
    eager, compiled, compilation = pair(name, method)
    for seed in (1, 2):
        text = ids(3, 20, seed)
        expected, found = eager(input_ids=text), compiled(input_ids=text)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
        for one, other in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
            torch.testing.assert_close(one.keys, other.keys, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(one.values, other.values, rtol=1e-5, atol=1e-6)
        following = [
            model(input_ids=text[:, :1], past_key_values=before.past_key_values).logits
            for model, before in ((compiled, found), (eager, expected))
        ]
        torch.testing.assert_close(*following, rtol=1e-5, atol=1e-5)
    assert len(compilation.graphs) == (1 if method is None else 2), "one for all layers of a shape"
    room = StaticCache(config=compiled.config, max_cache_len=24)
    found = compiled(input_ids=ids(3, 20, 3), past_key_values=room).logits
    torch.testing.assert_close(found, eager(input_ids=ids(3, 20, 3)).logits, rtol=1e-5, atol=1e-5)
