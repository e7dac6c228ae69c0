"""Graphs compute what the model computes, in the runtimes of their users."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pp_lightning import UserError, calibrate, kept_units, prune_
from pp_lightning.export import dynamic_check, export_dynamic_graph, export_graph
from pp_lightning.export.dynamic import trace_dynamic
from pp_lightning.export.formats import GRAPH_FORMATS
from pp_lightning.export.graph import trace
from pp_lightning.methods import FLAP, FullBatchProbing, ProbePruning, WandaSP
from tests.models import HEADS, calibration_batches, histories, ids, padded, ragged, tiny

LAYERS = {"num_hidden_layers": 2}  # tracing takes its time for every one of them
ROWS, TOKENS = 4, 24
slow = pytest.mark.slow


@lru_cache
def small_statistics(name, layers):
    return calibrate(tiny(name, num_hidden_layers=layers), calibration_batches(), progress=False)


def small(name, method, layers=2):
    """A model of two layers that keep different numbers of units."""
    model = tiny(name, num_hidden_layers=layers)
    prune_(model, method, small_statistics(name, layers), pruning_ratio=0.3, skip_layers=(), round_to=16)
    return model


@torch.no_grad()
def plain_logits(model, batch):
    mask = batch["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return model(**batch, position_ids=positions, use_cache=False).logits


# Each format, each kind of mask and of positions, with a cache and without one; not every one with every other.
STATIC = [
    ("pt2", "llama_gqa", True),
    ("onnx", "mistral", True),
    ("onnx", "qwen2", False),
    ("onnx", "opt", True),
    ("compiled", "llama", True),
]


@slow
@pytest.mark.parametrize(("form", "name", "kv_cache"), STATIC)
def test_static_graph(form, name, kv_cache, tmp_path):
    model = small(name, FLAP())
    told: list[str] = []
    agreement = export_graph(model, tmp_path / "out", form=form, kv_cache=kv_cache, tell=told.append)
    slow_part = {"onnx": "translating the graph into ONNX", "compiled": "compiling kernels for this machine"}.get(form)
    assert told[0] == "tracing the model" and any(line.startswith("writing model.") for line in told)
    assert slow_part is None or slow_part in told
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    described = record["graph"]
    layers = 2 if kv_cache else 0
    cache = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    assert described["inputs"] == ["input_ids", "attention_mask", "position_ids"] + [
        f"past_key_values.{c}" for c in cache
    ]
    assert described["outputs"] == ["logits"] + [f"present.{c}" for c in cache]
    assert agreement.largest_difference <= 2e-5 and agreement.same_tokens > 0
    graph = trace(model, kv_cache=kv_cache).without_program()
    session = GRAPH_FORMATS[form].load(tmp_path / "out", graph)
    for rows, tokens in ((2, 19), (1, 3), (5, 40)):  # none of them traced or checked before
        batch = padded(ids(rows, tokens), left=2)
        mask = batch["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        empty = [torch.zeros(rows, heads, 0, graph.head_size) for heads in graph.caches for _ in range(2)]
        found = session([batch["input_ids"], mask, positions, *empty])[0]
        torch.testing.assert_close(found[:, 2:], plain_logits(model, batch)[:, 2:], rtol=0, atol=2e-5)
    assert not torch.allclose(plain_logits(tiny(name, **LAYERS), batch), plain_logits(model, batch), atol=1e-2)


@slow
def test_onnx_in_a_process_of_its_own(tmp_path):
    """With onnxruntime and numpy alone, decoding with the cache."""
    model = small("llama_gqa", WandaSP())
    export_graph(model, tmp_path / "out", form="onnx")
    text = ids(2, 11)
    np.save(tmp_path / "ids.npy", text.numpy())
    code = f"""
import sys, numpy as np, onnxruntime
session = onnxruntime.InferenceSession({str(tmp_path / "out" / "model.onnx")!r})
ids = np.load({str(tmp_path / "ids.npy")!r})
caches = [entry for entry in session.get_inputs() if "past" in entry.name]
past = {{entry.name: np.zeros((2, entry.shape[1], 0, entry.shape[3]), np.float32) for entry in caches}}
names = [o.name for o in session.get_outputs()]
tokens, given, seen = [], ids, 0
for step in range(6):
    seen += given.shape[1]
    positions = np.broadcast_to(np.arange(seen - given.shape[1], seen), given.shape)
    feeds = {{"input_ids": given, "attention_mask": np.ones((2, seen), np.int64), "position_ids": positions, **past}}
    out = dict(zip(names, session.run(names, feeds)))
    if step == 0:
        np.save({str(tmp_path / "logits.npy")!r}, out["logits"])
    past = {{name.replace("present", "past_key_values"): out[name] for name in names if name != "logits"}}
    given = out["logits"][:, -1].argmax(-1)[:, None]
    tokens.append(given)
assert not {{"torch", "transformers", "pp_lightning", "export"}} & set(sys.modules)
np.save({str(tmp_path / "tokens.npy")!r}, np.concatenate(tokens, 1))
"""
    subprocess.run([sys.executable, "-c", code], cwd="/", check=True, capture_output=True)
    with torch.no_grad():
        expected = model(text, use_cache=False).logits
        tokens = model.generate(
            text, attention_mask=torch.ones_like(text), do_sample=False, min_new_tokens=6, max_new_tokens=6
        )
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected.numpy(), rtol=0, atol=2e-5)
    assert np.load(tmp_path / "tokens.npy").tolist() == tokens[:, 11:].tolist()


@slow
def test_pt2_in_a_process_of_its_own(tmp_path):
    model = small("llama_gqa", WandaSP())
    export_graph(model, tmp_path / "out", form="pt2", kv_cache=False)
    save_file({"ids": ids(3, 9)}, tmp_path / "ids.safetensors")
    code = f"""
import sys, torch
from safetensors.torch import load_file, save_file
program = torch.export.load({str(tmp_path / "out" / "model.pt2")!r}).module()
ids = load_file({str(tmp_path / "ids.safetensors")!r})["ids"]
logits = program(ids, torch.ones_like(ids), torch.arange(9).expand(3, 9), [])[0]
assert not {{"transformers", "pp_lightning", "export"}} & set(sys.modules)
save_file({{"logits": logits.detach().contiguous()}}, {str(tmp_path / "logits.safetensors")!r})
"""
    subprocess.run([sys.executable, "-c", code], cwd="/", check=True, capture_output=True)
    with torch.no_grad():
        expected = model(ids(3, 9), use_cache=False).logits
    torch.testing.assert_close(load_file(tmp_path / "logits.safetensors")["logits"], expected, rtol=0, atol=1e-5)


@slow
def test_weights_beside_the_graph_where_protobuf_ends(tmp_path, monkeypatch):
    """As if they were 3 GB."""
    real = GRAPH_FORMATS["onnx"]
    larger = replace(real, write=lambda graph, folder, size, tell: real.write(graph, folder, 3 * 1000**3, tell))
    monkeypatch.setitem(GRAPH_FORMATS, "onnx", larger)
    export_graph(small("llama", WandaSP(), 1), tmp_path / "out", form="onnx", kv_cache=False)
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size > 100_000
    assert (tmp_path / "out" / "model.onnx").stat().st_size < 1_000_000


BATCHES = [
    padded(ids(ROWS, TOKENS, seed=3)),
    ragged([24, 9, 24, 17], "left", seed=4),
    padded(ids(ROWS, TOKENS, seed=8)),
]


@slow
@pytest.mark.parametrize(("form", "name"), [("pt2", "llama"), ("onnx", "opt")])
def test_dynamic_graph_follows_the_model_over_batches(form, name, tmp_path):
    model = small(name, ProbePruning(row_ratio=0.5, momentum=0.5))
    export_dynamic_graph(model, tmp_path / "out", form=form, rows=ROWS, tokens=TOKENS)
    names = json.loads((tmp_path / "out" / "pruning.json").read_text())["graph"]
    start = load_file(tmp_path / "out" / "history.safetensors")
    assert names["inputs"] == ["input_ids", "attention_mask", *start]
    graph = trace_dynamic(model, ROWS, TOKENS).without_program()
    session = GRAPH_FORMATS[form].load(tmp_path / "out", graph)
    state, forgetful = list(start.values()), []
    choices = []
    for number, batch in enumerate(BATCHES):
        fed = [batch["input_ids"], batch["attention_mask"]]
        outputs = session([*fed, *state])
        state = outputs[1 : 1 + len(start)]
        forgetful.append(session([*fed, *start.values()]))
        with torch.no_grad():
            expected = model(**batch, use_cache=False).logits
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(outputs[0][real], expected[real], rtol=0, atol=2e-5)
        kept = [t.tolist() for units in kept_units(model).values() for t in (units.attention, units.mlp)]
        assert [t.tolist() for t in outputs[1 + len(start) :]] == kept
        choices.append(kept)
        for wanted, found in zip(histories(model).values(), state, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
        assert number == 0 or not torch.equal(forgetful[number][1], state[0])  # whoever drops the history notices
    assert choices[0] != choices[1] != choices[2]


@pytest.mark.slow
def test_a_smaller_batch_is_filled_up_with_padding(tmp_path):
    """Rows and columns that the mask leaves out change nothing."""
    model, twin = (small("llama", ProbePruning(row_ratio=0.5)) for _ in range(2))
    graph = trace_dynamic(model, ROWS, TOKENS)
    start = [history for history in histories(model).values()]
    text = ids(3, 20)
    with torch.no_grad():
        expected = twin(text, attention_mask=torch.ones_like(text), use_cache=False).logits
        filled, mask = torch.full((ROWS, TOKENS), 5), torch.zeros(ROWS, TOKENS, dtype=torch.long)
        filled[:3, :20], mask[:3, :20] = text, 1
        outputs = graph.program.module()(filled, mask, start)
    torch.testing.assert_close(outputs[0][:3, :20], expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_tracing_leaves_the_model_as_it_was():
    model = small("llama", ProbePruning())
    before, attention = histories(model), model.config._attn_implementation
    trace_dynamic(model, ROWS, TOKENS)
    assert all(torch.equal(before[key], after) for key, after in histories(model).items())
    assert model.config._attn_implementation == attention
    assert kept_units(model) == {}


@slow
@pytest.mark.parametrize("compensation", ["probe", "history"])
def test_compensation_is_part_of_the_graph(compensation, tmp_path):
    model = small("llama", ProbePruning(row_ratio=0.5, compensation=compensation, score="centered"), 1)
    export_dynamic_graph(model, tmp_path / "out", form="pt2", rows=ROWS, tokens=TOKENS)
    start = load_file(tmp_path / "out" / "history.safetensors")
    assert any(name.startswith("mean.") for name in start) == (compensation == "history")


@slow
def test_full_batch_probing_needs_no_history(tmp_path):
    model = small("llama", FullBatchProbing(), 1)
    export_dynamic_graph(model, tmp_path / "out", form="pt2", rows=ROWS, tokens=TOKENS)
    assert not (tmp_path / "out" / "history.safetensors").exists()


def faithful(model):
    """A session that is the eager model itself, with its history as an argument."""
    graph = trace_dynamic(model, ROWS, TOKENS)
    program = graph.program.module()
    return lambda inputs: list(program(*inputs[:2], list(inputs[2:])))


@pytest.fixture(scope="module")
def checked():
    """What a model does, its histories at the start, and its graph."""
    model = small("llama", ProbePruning(row_ratio=0.5))
    with torch.no_grad():
        expected = dynamic_check.DynamicBehaviour.of(model, ROWS, TOKENS)
        return expected, list(histories(model).values()), faithful(model)


def forgets(session, states):
    def run(inputs):
        outputs = session(inputs)
        return [outputs[0], *inputs[2:], *outputs[1 + states :]]

    return run


def forgets_at_the_end(session, states):
    calls = []

    def run(inputs):
        calls.append(inputs)
        return (session if len(calls) < 3 else forgets(session, states))(inputs)

    return run


def miscounts(session, states):
    def run(inputs):
        outputs = session(inputs)
        kept = [(units + 1) % HEADS for units in outputs[1 + states :]]
        return [*outputs[: 1 + states], *kept]

    return run


def drifts(session, states):
    return lambda inputs: [out + 0.01 if i == 0 else out for i, out in enumerate(session(inputs))]


@slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (None, ""),
        (forgets, "logits differ"),
        (forgets_at_the_end, "histories are not the model's"),
        (miscounts, "kept units differ"),
        (drifts, "logits differ"),
    ],
)
@torch.no_grad()
def test_the_check_of_a_dynamic_graph(fault, message, checked):
    expected, start, session = checked
    if fault is None:
        assert expected.check(session, start, torch.float32, 2).swapped_units == 0
        return
    with pytest.raises(UserError, match=message):
        expected.check(fault(session, len(start)), start, torch.float32, 2)


@pytest.mark.slow
@pytest.mark.parametrize("method", [ProbePruning(row_ratio=0.5), FullBatchProbing()], ids=["pp", "full_batch"])
def test_a_graph_has_no_operators_of_ours(method):
    """Whoever loads it has PyTorch alone."""
    program = trace_dynamic(small("llama", method, 1), ROWS, TOKENS).program
    assert not {str(node.target) for node in program.graph.nodes if "pp_lightning" in str(node.target)}


def test_a_drawn_probe_fits_no_graph():
    with pytest.raises(UserError, match="drawn anew"):
        trace_dynamic(small("llama", ProbePruning(rank_by="stratified")), ROWS, TOKENS)


def test_batches_longer_than_the_histories(tmp_path):
    with pytest.raises(UserError, match="32 calibrated positions"):
        export_dynamic_graph(small("llama", ProbePruning()), tmp_path / "out", form="pt2", rows=2, tokens=40)
    assert list(tmp_path.iterdir()) == []


def test_a_static_choice_has_no_dynamic_graph():
    with pytest.raises(UserError, match="static"):
        trace_dynamic(small("llama", WandaSP()), ROWS, TOKENS)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"pip install 'pp-lightning\[onnx\]'"):
        export_graph(small("llama", WandaSP()), tmp_path / "out", form="onnx")
    assert list(tmp_path.iterdir()) == []
