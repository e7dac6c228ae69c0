import math

import pytest

from pp_lightning import kept_units, prune_
from pp_lightning.blocks import Block
from pp_lightning.methods import StaticPPsp, WandaSP
from tests.models import GROUPS, HEADS, PRUNED, SETTINGS, output_weights, statistics, tiny


@pytest.mark.parametrize(("name", "units"), [("llama", HEADS), ("llama_gqa", GROUPS), ("opt", HEADS)])
def test_choice_equals_the_naive_loop(name, units):
    model, stats = tiny(name), statistics(name)
    prune_(model, WandaSP(), stats, **SETTINGS)
    for layer in PRUNED:
        kept = kept_units(model)[layer]
        for block, weight, found, number in (
            (Block.ATTENTION, output_weights(tiny(name), layer)[0], kept.attention, units),
            (Block.MLP, output_weights(tiny(name), layer)[1], kept.mlp, 160),
        ):
            squares = stats.sums[layer, block].squares.double()
            columns = []
            for c in range(weight.shape[1]):
                energy = sum((squares[:, c] / stats.counts.double()).tolist())
                columns.append(sum(abs(w) for w in weight[:, c].tolist()) * math.sqrt(energy))
            width = len(columns) // number
            scores = [sum(columns[u * width : (u + 1) * width]) for u in range(number)]
            best = sorted(range(number), key=lambda u: -scores[u])[: len(found)]
            assert found.tolist() == sorted(best)


def test_differs_from_ppsp():
    chosen = []
    for method in (WandaSP(), StaticPPsp()):
        model = tiny("llama")
        prune_(model, method, statistics("llama"), **SETTINGS)
        chosen.append([units.mlp.tolist() for units in kept_units(model).values()])
    assert chosen[0] != chosen[1]
