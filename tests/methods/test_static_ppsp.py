import math

import pytest

from pp_lightning import kept_units, prune_
from pp_lightning.blocks import Block
from pp_lightning.methods import ProbePruning, StaticPPsp
from tests.models import CALIBRATED, GROUPS, HEADS, PRUNED, SETTINGS, ids, logits, output_weights, statistics, tiny


@pytest.mark.parametrize(("name", "units"), [("llama", HEADS), ("llama_gqa", GROUPS), ("opt", HEADS)])
def test_choice_equals_the_naive_loop(name, units):
    model, stats = tiny(name), statistics(name)
    prune_(model, StaticPPsp(), stats, **SETTINGS)
    for layer in PRUNED:
        kept = kept_units(model)[layer]
        for block, weight, found, number in (
            (Block.ATTENTION, output_weights(tiny(name), layer)[0], kept.attention, units),
            (Block.MLP, output_weights(tiny(name), layer)[1], kept.mlp, 160),
        ):
            squares = stats.sums[layer, block].squares.double()
            energy = [sum((squares[:, c] / stats.counts.double()).tolist()) for c in range(weight.shape[1])]
            width = weight.shape[1] // number
            scores = [
                math.sqrt(
                    sum(
                        (energy[c] * w * w) ** 2
                        for c in range(unit * width, (unit + 1) * width)
                        for w in weight[:, c].tolist()
                    )
                )
                for unit in range(number)
            ]
            best = sorted(range(number), key=lambda u: -scores[u])[: len(found)]
            assert found.tolist() == sorted(best)


def test_is_probe_pruning_that_listens_to_the_history_alone():
    static, dynamic, stats = tiny("llama"), tiny("llama"), statistics("llama")
    prune_(static, StaticPPsp(), stats, **SETTINGS)
    prune_(dynamic, ProbePruning(1.0, 1.0, fusion_weight=0.0), stats, **SETTINGS)
    logits(dynamic, ids(4, CALIBRATED))
    for layer, units in kept_units(static).items():
        assert kept_units(dynamic)[layer].attention.tolist() == units.attention.tolist()
        assert kept_units(dynamic)[layer].mlp.tolist() == units.mlp.tolist()
