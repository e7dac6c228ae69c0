import math

import pytest
import torch

from pp_lightning import kept_units, prune_
from pp_lightning.blocks import AttentionUnit, Block, BlockPlan, Units, units_of
from pp_lightning.families import shape_of
from pp_lightning.methods import FLAP
from pp_lightning.methods.base import BlockToPrune
from pp_lightning.methods.ranking import ranked_counts
from tests.models import GROUPS, HEADS, PRUNED, SETTINGS, calibration_batches, logits, output_weights, statistics, tiny


def block(kind, number, cost, ratio, round_to=1, layer=3):
    units = Units(number=number, channels=1, cost=cost)
    plan = BlockPlan(kind, units, ratio, keep=number, round_to=round_to)
    return BlockToPrune(layer, plan, torch.zeros(1, number))


def naive_counts(blocks, scores):
    """The cheapest-to-lose go first, one at a time, until the next one would exceed the budget."""
    budget = sum(b.plan.ratio * b.units.number * b.units.cost for b in blocks)
    ranking = sorted(
        (score, index, unit) for index, s in enumerate(scores) for unit, score in enumerate(s.double().tolist())
    )
    kept, spent = [b.units.number for b in blocks], 0.0
    for _, index, _ in ranking:
        spent += blocks[index].units.cost
        if spent > budget:
            break
        kept[index] -= 1
    for index, b in enumerate(blocks):
        if b.plan.block is Block.ATTENTION:
            kept[index] = max(1, kept[index])
        else:
            multiple = b.plan.round_to
            kept[index] = min(b.units.number, max(multiple, math.ceil(kept[index] / multiple) * multiple))
    return kept


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("ratio", [0.1, 0.44, 0.8])
def test_counts_equal_the_naive_greedy(seed, ratio):
    torch.manual_seed(seed)
    blocks, scores = [], []
    for layer in range(3):
        blocks.append(block(Block.ATTENTION, 8, 171, ratio, layer=layer))
        blocks.append(block(Block.MLP, 96, 1, ratio, round_to=8, layer=layer))
        scores += [torch.randn(8) + layer, torch.randn(96) - layer]
    found = ranked_counts(blocks, scores)
    assert found == naive_counts(blocks, scores)
    assert len(set(found)) > 2  # layers differ


def test_a_head_costs_what_it_weighs():
    """With a budget of one head, either one head goes or as many channels as it weighs."""
    attention, mlp = block(Block.ATTENTION, 4, 10, 0.25), block(Block.MLP, 40, 1, 0.0)
    low, high = torch.arange(4.0), torch.arange(40.0) + 100
    assert ranked_counts([attention, mlp], [low, high]) == [3, 40]
    assert ranked_counts([attention, mlp], [low + 1000, high]) == [4, 30]


def test_at_least_one_head_stays_and_one_multiple_of_channels():
    attention, mlp = block(Block.ATTENTION, 4, 1, 0.9), block(Block.MLP, 40, 1, 0.9, round_to=8)
    assert ranked_counts([attention, mlp], [torch.zeros(4) - 5, torch.arange(40.0)])[0] == 1
    assert ranked_counts([attention, mlp], [torch.zeros(4) + 50, torch.arange(40.0)])[1] == 8


@pytest.mark.parametrize("name", ["llama", "llama_gqa", "opt"])
@pytest.mark.parametrize("uniform", [False, True])
def test_choice_equals_the_naive_loop(name, uniform):
    """FLAP from the raw sums to the kept units."""
    model, stats = tiny(name), statistics(name)
    prune_(model, FLAP(uniform=uniform), stats, **SETTINGS)
    shape = shape_of(model.config)
    tokens = stats.counts.double().sum().item()
    blocks, scores, found = [], [], []
    for layer in PRUNED:
        for kind, weight in zip(Block, output_weights(tiny(name), layer), strict=True):
            sums = stats.sums[layer, kind]
            columns = []
            for c in range(weight.shape[1]):
                mean = sums.values[:, c].double().sum().item() / tokens
                variance = sums.squares[:, c].double().sum().item() / tokens - mean**2
                metric = variance * sum(w * w for w in weight[:, c].tolist())
                columns.append(metric**2 if kind is Block.ATTENTION else metric)
            average = sum(columns) / len(columns)
            deviation = math.sqrt(sum((x - average) ** 2 for x in columns) / (len(columns) - 1))
            columns = [(x - average) / deviation for x in columns]
            units = units_of(shape, kind, AttentionUnit.default_for(shape))
            width = units.channels
            scores.append(
                torch.tensor([sum(columns[u * width : (u + 1) * width]) / width for u in range(units.number)])
            )
            plan = BlockPlan(kind, units, 0.67, keep=0, round_to=16 if kind is Block.MLP else 1)
            blocks.append(BlockToPrune(layer, plan, weight))
            kept = kept_units(model)[layer]
            found.append(kept.attention if kind is Block.ATTENTION else kept.mlp)
    heads = 2 if shape.grouped else 3
    counts = [heads, 64] * 3 if uniform else naive_counts(blocks, scores)
    assert [len(kept) for kept in found] == counts
    for kept, score, count in zip(found, scores, counts, strict=True):
        assert kept.tolist() == sorted(sorted(range(len(score)), key=lambda u, score=score: -score[u].item())[:count])
    if not uniform:
        assert len({tuple(counts[i : i + 2]) for i in (0, 2, 4)}) > 1  # ratios differ from layer to layer


def test_removes_about_the_asked_share():
    """Never more than asked, and less only by rounding and by the next unit that did not fit."""
    model = tiny("llama")
    prune_(model, FLAP(), statistics("llama"), **SETTINGS)
    shape = shape_of(model.config)
    lost = whole = 0
    for units in kept_units(model).values():
        for kind, kept in ((Block.ATTENTION, units.attention), (Block.MLP, units.mlp)):
            of = units_of(shape, kind, AttentionUnit.QUERY_HEAD)
            lost += (of.number - len(kept)) * of.cost
            whole += of.number * of.cost
    assert 0.55 < lost / whole <= 0.67


@pytest.mark.parametrize(("name", "units"), [("llama", HEADS), ("llama_gqa", GROUPS), ("opt", HEADS)])
@pytest.mark.parametrize("uniform", [False, True])
def test_bias_is_the_mean_output_of_what_was_removed(name, units, uniform):
    model, stats = tiny(name), statistics(name)
    prune_(model, FLAP(uniform=uniform), stats, **SETTINGS)
    architecture_layers = model.model.decoder.layers if name == "opt" else model.model.layers
    for layer in PRUNED:
        kept = kept_units(model)[layer]
        module = architecture_layers[layer]
        attention, mlp = (
            (module.self_attn.out_proj, module.fc2)
            if name == "opt"
            else (
                module.self_attn.o_proj,
                module.mlp.down_proj,
            )
        )
        dense = tiny(name)
        dense_layer = (dense.model.decoder.layers if name == "opt" else dense.model.layers)[layer]
        own = (dense_layer.self_attn.out_proj.bias, dense_layer.fc2.bias) if name == "opt" else (None, None)
        for kind, output, kept_here, number, existing in (
            (Block.ATTENTION, attention, kept.attention, units, own[0]),
            (Block.MLP, mlp, kept.mlp, 160, own[1]),
        ):
            weight = output_weights(dense, layer)[kind is Block.MLP].detach().double()
            mean = stats.sums[layer, kind].values.double().sum(0) / stats.counts.sum()
            width = weight.shape[1] // number
            removed = [c for c in range(weight.shape[1]) if c // width not in kept_here.tolist()]
            expected = sum(weight[:, c] * mean[c] for c in removed)
            if existing is not None:  # OPT: on top of the bias that is there
                expected = expected + existing.double()
            torch.testing.assert_close(output.bias.double(), expected.detach(), rtol=1e-4, atol=1e-6)


def test_without_bias():
    model = tiny("llama")
    prune_(model, FLAP(bias=False), statistics("llama"), **SETTINGS)
    assert all(layer.mlp.down_proj.bias is None and layer.self_attn.o_proj.bias is None for layer in model.model.layers)
    model = tiny("opt")
    prune_(model, FLAP(bias=False), statistics("opt"), **SETTINGS)
    for layer, dense in zip(model.model.decoder.layers, tiny("opt").model.decoder.layers, strict=True):
        assert torch.equal(layer.fc2.bias, dense.fc2.bias)


def test_bias_keeps_the_mean_output():
    """Over the calibration set itself, a pruned block with bias has the mean output of the dense one."""
    means = {}
    settings = {**SETTINGS, "skip_layers": (0, 1, 2, 3), "pruning_ratio": 0.1}  # its input is the dense one
    for label, method in (
        ("dense", None),
        ("bias", FLAP(blocks=("mlp",))),
        ("none", FLAP(blocks=("mlp",), bias=False)),
    ):
        model = tiny("llama")
        if method is not None:
            prune_(model, method, statistics("llama"), **settings)
        outputs = []
        model.model.layers[4].mlp.register_forward_hook(lambda _, __, out, outputs=outputs: outputs.append(out))
        for batch in calibration_batches():
            logits(model, batch["input_ids"])
        means[label] = torch.cat(outputs).double().mean(dim=(0, 1))
    torch.testing.assert_close(means["bias"], means["dense"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(means["none"], means["dense"], atol=1e-3)
