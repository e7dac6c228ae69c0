"""Parallel probes on a stream of their own: the same numbers in whatever order the device works.

No accelerator is needed: a stand-in does the side stream's work at once, or as late as it may be done.
"""

import copy
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch

from pp_lightning import compile_, kept_units, prune_, uncompile_
from pp_lightning.methods import ProbePruning
from pp_lightning.pruned import streams
from pp_lightning.pruned.choice import Choice
from pp_lightning.pruned.context import ModelContext
from pp_lightning.pruned.conversations import HeldSlices
from pp_lightning.pruned.inputs import BatchInputs, Earlier
from pp_lightning.pruned.streams import SideStream
from pp_lightning.pruning import pruning_of
from tests.models import SETTINGS, choices, histories, ids, logits, padded, statistics, tiny

METHODS = {
    "paper": lambda: ProbePruning(probe_source="previous"),
    "attention": lambda: ProbePruning(probe_source="previous", blocks=("attention",)),
    "mlp": lambda: ProbePruning(probe_source="previous", blocks=("mlp",)),
    "restoring": lambda: ProbePruning(probe_source="previous", compensation="probe", rank_by="stratified"),
}


class Started(NamedTuple):
    after: int
    choice: object


class StandIn:
    """Counts moments, and makes choices when they are started, or when they are joined."""

    def __init__(self, *, late: bool) -> None:
        self.late = late
        self.now = 0
        self.log = []

    def moment(self) -> int:
        self.now += 1
        return self.now

    def start(self, after, choose):
        self.log.append(("start", after, self.now))
        return Started(after, choose if self.late else choose())

    def join(self, started):
        self.log.append(("join", started.after, self.now))
        return started.choice() if self.late else started.choice


def pruned(name="llama", method="paper"):
    model = tiny(name)
    prune_(model, METHODS[method](), statistics(name), **SETTINGS)
    return model


@torch.no_grad()
def outputs(model, batch):
    return model(**batch, use_cache=False).logits


def beside(monkeypatch, *, late):
    side = StandIn(late=late)
    monkeypatch.setattr(ModelContext, "side_stream", lambda self, device: side if self.overlaps else None)
    return side


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama_gqa", "opt"])
def test_the_same_as_in_line(monkeypatch, name, method, late):
    inline, model = pruned(name, method), pruned(name, method)
    batches = [{"input_ids": ids(seed=1)}, padded(ids(seed=2), left=3), {"input_ids": ids(seed=3)}]
    expected = [outputs(inline, batch) for batch in batches]
    text = inline.generate(ids(2, 12), max_new_tokens=5, do_sample=False)
    side = beside(monkeypatch, late=late)
    found = [outputs(model, batch) for batch in batches]
    assert side.log
    torch.testing.assert_close(found, expected)
    assert torch.equal(model.generate(ids(2, 12), max_new_tokens=5, do_sample=False), text)
    assert choices(kept_units(model)) == choices(kept_units(inline))
    for key, history in histories(inline).items():
        torch.testing.assert_close(histories(model)[key], history)


def test_an_attention_probe_starts_before_the_mlp_in_front_of_it(monkeypatch):
    """Each layer marks two moments: when it is entered, and between its blocks."""
    side = beside(monkeypatch, late=False)
    model = pruned("llama")
    logits(model, ids())
    first = next(iter(pruning_of(model).keep))[0]
    starts = [(after, now) for what, after, now in side.log if what == "start"]
    attention, mlp = starts[::2], starts[1::2]
    assert len(attention) == len(mlp) == len(pruning_of(model).keep) // 2
    assert all(after < now for after, now in attention), "the moment lies before the MLP of the layer in front"
    assert all(after < now for after, now in mlp), "the moment lies before the attention in front"
    joins = [what for what, *_ in side.log]
    assert joins == ["start", "join"] * (2 * len(attention))
    assert first > 0, "a dense layer in front published its residual too"


@pytest.mark.parametrize(("rank_by", "whole"), [("residual", False), ("input", True)])
def test_a_probe_alone_is_normalised_in_front(rank_by, whole):
    """The batch's own norm comes later: to normalise all of it for the probe took longer than the probe, on an H200."""
    model = tiny("llama")
    prune_(model, ProbePruning(probe_source="previous", rank_by=rank_by), statistics("llama"), **SETTINGS)
    sizes = []
    for block in pruning_of(model).pruners.values():
        stock = block.norm.forward
        block.norm.forward = lambda states, stock=stock: sizes.append(tuple(states.shape[:2])) or stock(states)
    logits(model, ids())
    batch, probe = tuple(ids().shape), ProbePruning().probe_sizes(*ids().shape)
    of_probes, blocks = batch if whole else probe, len(pruning_of(model).pruners)
    assert sorted(sizes) == sorted([batch] * blocks + [of_probes] * blocks)


@pytest.mark.slow
def test_a_graph_holds_its_probes(monkeypatch):
    side = beside(monkeypatch, late=True)
    model = pruned("llama_gqa")
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: real(function, backend="eager", fullgraph=True))
    compile_(model)
    logits(model, ids())
    assert not side.log
    uncompile_(model)
    logits(model, ids())
    assert side.log


def test_a_copy_is_made_without_what_cannot_be_copied():
    """On an accelerator an earlier residual comes with an event; a batch that failed leaves one behind."""
    model, context = pruned(), None
    context = pruning_of(model).context
    context.batch = BatchInputs(torch.Size((1, 1)))
    context.batch.middle = Earlier(torch.zeros(1, 1, 4), torch.Event("cpu"))
    with pytest.raises(TypeError, match="Event"):
        copy.deepcopy(context.batch.middle)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, ids(seed=2)), logits(model, ids(seed=2)))


def test_a_cpu_has_no_side_stream():
    assert ModelContext(None, (), (), uses_cache=False, held=HeldSlices(1)).side_stream(torch.device("cpu")) is None


def test_the_side_waits_for_what_it_reads_and_is_waited_for(monkeypatch):
    log = []

    class Stream(nullcontext):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def record_event(self):
            return f"event of {self.name}"

        def wait_event(self, event):
            log.append(f"{self.name} waits for {event}")

        def __enter__(self):
            log.append(f"{self.name} entered")

        def __exit__(self, *error):
            log.append(f"{self.name} left")

    class Kept:
        def record_stream(self, stream):
            log.append(f"kept is used by {stream.name}")

    main, device = Stream("main"), torch.device("cuda")
    monkeypatch.setattr(streams.torch, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(streams.torch.accelerator, "current_stream", lambda device: main)
    side = SideStream(device)
    ahead = side.start(side.moment(), lambda: log.append("chosen") or Choice(Kept()))
    assert side.join(ahead) is ahead.choice
    assert log == [
        "side waits for event of main",
        "side entered",
        "chosen",
        "side left",
        "main waits for event of side",
        "kept is used by main",
    ]
    assert copy.deepcopy(side) is not side and copy.deepcopy(side).device == device
