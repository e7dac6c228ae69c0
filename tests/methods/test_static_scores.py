"""PPsp and Wanda-sp: choices from statistics alone."""

import math

import pytest

from pp_lightning import kept_units, prune_
from pp_lightning.blocks import Block
from pp_lightning.methods import ProbePruning, StaticPPsp, WandaSP
from tests.models import (
    CALIBRATED,
    GROUPS,
    HEADS,
    PRUNED,
    SETTINGS,
    ids,
    logits,
    output_weights,
    pruned,
    statistics,
    tiny,
)


def ppsp(columns, energies):
    """Root of the squared sum over a unit's channels and rows of ``(energy w^2)^2``."""
    terms = zip(columns, energies, strict=True)
    return math.sqrt(sum((energy * w * w) ** 2 for column, energy in terms for w in column))


def wanda_sp(columns, energies):
    """Sum over a unit's channels and rows of ``|w| sqrt(energy)``."""
    terms = zip(columns, energies, strict=True)
    return sum(sum(map(abs, column)) * math.sqrt(energy) for column, energy in terms)


@pytest.mark.parametrize(("method", "score"), [(StaticPPsp, ppsp), (WandaSP, wanda_sp)])
@pytest.mark.parametrize(("name", "units"), [("llama", HEADS), ("llama_gqa", GROUPS), ("opt", HEADS)])
def test_choice_equals_the_naive_loop(name, units, method, score):
    model, stats = tiny(name), statistics(name)
    prune_(model, method(), stats, **SETTINGS)
    for layer in PRUNED:
        kept = kept_units(model)[layer]
        attention, mlp = output_weights(tiny(name), layer)
        for block, weight, found, number in (
            (Block.ATTENTION, attention, kept.attention, units),
            (Block.MLP, mlp, kept.mlp, 160),
        ):
            energy = (stats.sums[layer, block].squares.double() / stats.counts.double()[:, None]).sum(0).tolist()
            columns, width = weight.t().tolist(), weight.shape[1] // number
            parts = [slice(unit * width, (unit + 1) * width) for unit in range(number)]
            scores = [score(columns[part], energy[part]) for part in parts]
            best = sorted(range(number), key=lambda u, scores=scores: -scores[u])[: len(found)]
            assert found.tolist() == sorted(best)


def test_they_differ():
    found = [pruned(method=method) for method in (WandaSP, StaticPPsp)]
    first, second = ([units.mlp.tolist() for units in kept_units(model).values()] for model in found)
    assert first != second


def test_is_probe_pruning_that_listens_to_the_history_alone():
    static, dynamic, stats = tiny("llama"), tiny("llama"), statistics("llama")
    prune_(static, StaticPPsp(), stats, **SETTINGS)
    prune_(dynamic, ProbePruning(1.0, 1.0, fusion_weight=0.0), stats, **SETTINGS)
    logits(dynamic, ids(4, CALIBRATED))
    for layer, units in kept_units(static).items():
        assert kept_units(dynamic)[layer].attention.tolist() == units.attention.tolist()
        assert kept_units(dynamic)[layer].mlp.tolist() == units.mlp.tolist()
