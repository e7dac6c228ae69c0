"""Models that accelerate has wrapped, as it does for several devices: on one CPU, with the same wrapping."""

import pytest
import torch
from accelerate import cpu_offload, dispatch_model

from pp_lightning import UserError, calibrate, compile_, prune_, unprune_
from pp_lightning.families import layers_of
from pp_lightning.gradients import recomputed
from pp_lightning.interfaces import is_wrapped
from pp_lightning.methods import FLAP, ProbePruning
from tests.models import SETTINGS, calibration_batches, histories, ids, logits, statistics, tiny

NAMES = ["llama_gqa", "opt"]


def wrapped(name):
    model = tiny(name)
    dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)
    assert all(is_wrapped(layer) for layer in layers_of(model))
    return model


def count_moves(model):
    """How often accelerate moves the inputs of a pruned layer, from now on."""
    moves, hook = [], layers_of(model)[3]._hf_hook
    original = hook.pre_forward

    def pre_forward(*args, **kwargs):
        moves.append(1)
        return original(*args, **kwargs)

    hook.pre_forward = pre_forward
    return moves


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", [ProbePruning(row_ratio=0.3), ProbePruning.best(), FLAP()])
def test_pruning_goes_inside_of_what_accelerate_wraps(name, method):
    plain, model = tiny(name), wrapped(name)
    dense = logits(plain, ids())
    moves = count_moves(model)
    for one in (plain, model):
        prune_(one, method, statistics(name), **SETTINGS)
    assert torch.equal(logits(model, ids()), logits(plain, ids()))
    assert len(moves) == 1, "the layer's inputs are still moved to its device"
    for key, history in histories(plain).items():
        assert torch.equal(histories(model)[key], history)
    unprune_(model)
    assert torch.equal(logits(model, ids()), dense)
    assert len(moves) == 2, "and so they are afterwards"


def test_calibration():
    found = calibrate(wrapped("llama"), calibration_batches(), progress=False)
    for key, sums in statistics("llama").sums.items():
        assert torch.equal(found.sums[key].squares, sums.squares)


def test_recomputed_layers():
    model = wrapped("llama")
    moves, expected = count_moves(model), logits(model, ids())
    with recomputed(model):
        assert torch.equal(logits(model, ids()), expected)
    assert torch.equal(logits(model, ids()), expected)
    assert len(moves) == 3


def test_compiling_it_is_refused():
    model = wrapped("llama")
    with pytest.raises(UserError, match="load without it to compile"):
        compile_(model)
    logits(model, ids())


@pytest.mark.parametrize("method", [ProbePruning(), FLAP()])
def test_offloaded_weights_are_refused(method):
    model = tiny("llama")
    cpu_offload(model, torch.device("cpu"))
    with pytest.raises(UserError, match="weights are offloaded"):
        prune_(model, method, statistics("llama"), **SETTINGS)
    logits(model, ids())
