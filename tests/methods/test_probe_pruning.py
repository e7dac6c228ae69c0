import math

import pytest
import torch

from pp_lightning import UserError, calibrate, kept_units, prune_, unprune_
from pp_lightning.functional.moments import TokenPositions
from pp_lightning.methods import ProbePruning, StaticPPsp, WandaSP
from tests.models import PRUNED, SETTINGS, histories, ids, logits, output_weights, ragged, run_frozen, statistics, tiny
from tests.recording import RecordingProbePruning


def naive_energy(states, probe, places, history, weight):
    """In loops: fused moment at the positions of the selected columns, summed."""
    rows, tokens = probe.rows.tolist(), probe.tokens.tolist()
    valid = [True] * len(tokens) if probe.real_tokens is None else probe.real_tokens.tolist()
    num_rows = len(places.real)
    selected = {
        int(places.positions[b, t])
        for t, use in zip(tokens, valid, strict=True)
        if use
        for b in range(num_rows)
        if places.real[b, t]
    }
    energy = [0.0] * states.shape[2]
    for position in selected:
        here = []
        for i, b in enumerate(rows):
            for j, t in enumerate(tokens):
                counts = probe.real is None or bool(probe.real[i, j])
                if counts and places.real[b, t] and int(places.positions[b, t]) == position:
                    here.append(states[i, j].tolist())
        for c in range(states.shape[2]):
            p = sum(x[c] ** 2 for x in here) / len(here) if here else 0.0
            h = history[position, c].item()
            w = weight if weight is not None else (p / (p + h) if p + h > 0 else 0.0)
            energy[c] += w * p + (1 - w) * h
    return torch.tensor(energy)


@pytest.mark.parametrize("weight", [None, 0.0, 0.4, 1.0])
@pytest.mark.parametrize("lengths", [None, [12, 5, 9, 1, 7], [3, 12, 12, 2, 8]])
@pytest.mark.parametrize("side", ["left", "right"])
def test_energy_equals_the_naive_loop(weight, lengths, side):
    method = ProbePruning(row_ratio=0.5, token_ratio=0.6, fusion_weight=weight)
    residual = torch.randn(5, 12, 8)
    history = torch.rand(16, 6)
    history[3, 2] = 0.0
    if lengths is None:
        real, places = None, None
        everywhere = TokenPositions(torch.arange(12).repeat(5, 1), torch.ones(5, 12, dtype=torch.bool), 12)
    else:
        real = ragged(lengths, side)["attention_mask"].bool()
        everywhere = places = TokenPositions(real.long().cumsum(1) - 1, real, 12)
    probe = method.select(residual, residual, real)
    states = torch.randn(len(probe.rows), len(probe.tokens), 6)
    found = method.observe(states, probe, places, history, None).energy
    expected = naive_energy(states, probe, everywhere, history, weight)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_ranks_by_what_it_is_told():
    residual, normed = torch.ones(1, 30, 2), torch.ones(1, 30, 2)
    residual[:, :15] = 2.0
    normed[:, 15:] = 2.0
    tokens = {by: ProbePruning(rank_by=by).select(residual, normed, None).tokens for by in ("residual", "input")}
    assert tokens["residual"].tolist() == list(range(15))
    assert tokens["input"].tolist() == list(range(15, 30))


def test_scores_and_choice_of_a_whole_batch():
    """From the recorded probe states to the kept units, in loops, for the default method on a real layer."""
    model, method, stats = tiny("llama"), RecordingProbePruning(), statistics("llama")
    prune_(model, method, stats, **SETTINGS)
    before = histories(model)
    logits(model, ids())
    everywhere = TokenPositions(torch.arange(24).repeat(4, 1), torch.ones(4, 24, dtype=torch.bool), 24)
    kept = kept_units(model)
    for (layer, block), record in method.taken(PRUNED).items():
        energy = naive_energy(record.states, record.probe, everywhere, before[layer, block], None)
        weight = output_weights(tiny("llama"), layer)[block == "mlp"].detach().double()
        channels = [energy[c].item() * math.sqrt(sum(w**4 for w in weight[:, c].tolist())) for c in range(len(energy))]
        width = 1 if block == "mlp" else 8
        scores = [math.sqrt(sum(x * x for x in channels[u : u + width])) for u in range(0, len(channels), width)]
        torch.testing.assert_close(record.scores, torch.tensor(scores), rtol=1e-5, atol=0)
        best = sorted(sorted(range(len(scores)), key=lambda u: -scores[u])[: 3 if block == "attention" else 64])
        assert getattr(kept[layer], block).tolist() == best


def test_probe_runs_at_its_true_positions_with_dense_weights():
    """The probe of everything gives the states of the dense block."""
    model, method = tiny("llama"), RecordingProbePruning(1.0, 1.0, blocks=("mlp",))
    prune_(model, method, statistics("llama"), **{**SETTINGS, "skip_layers": (0, 1, 3, 4), "pruning_ratio": 0.1})
    caught = []
    dense = tiny("llama")
    dense.model.layers[2].mlp.down_proj.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    logits(dense, ids())
    logits(model, ids())
    torch.testing.assert_close(method.records[0].states, caught[0], rtol=1e-5, atol=1e-5)


def test_a_probe_sees_only_itself():
    """Attention among the selected tokens: what was not selected has no part in the probe."""
    model = tiny("llama")
    method = RecordingProbePruning(blocks=("attention",))
    prune_(model, method, statistics("llama"), **{**SETTINGS, "skip_layers": (1, 2, 3, 4), "pruning_ratio": 0.1})
    text = ids(4, 24)
    logits(model, text)
    record = method.records.pop()
    chosen = record.probe
    # layer 0 sees embeddings: the same selection alone, at the same positions, run through the dense attention
    part = chosen.take(text)
    dense = tiny("llama")
    caught = []
    dense.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    # with a mask, or transformers takes positions with gaps for several texts in one row
    logits(dense, part, position_ids=chosen.tokens[None].expand(part.shape), attention_mask=torch.ones_like(part))
    torch.testing.assert_close(record.states, caught[0], rtol=1e-5, atol=1e-5)


MARKED, MARKER, CHANNEL, LAYER = 7, 63, 11, 3


def with_planted_channel():
    """A model in which one MLP channel of one layer is driven by one token alone, through a direction of its own."""
    model = tiny("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, MARKER] = 0.0
        model.model.embed_tokens.weight[MARKED, MARKER] = 60.0  # so large that the probe picks it
        for layer in range(5):
            for weight in output_weights(model, layer):
                weight[MARKER] = 0.0  # nothing else writes to the direction
        mlp = model.model.layers[LAYER].mlp
        for weight in (mlp.gate_proj.weight, mlp.up_proj.weight):
            weight[CHANNEL] = 0.0
            weight[CHANNEL, MARKER] = 4.0
    return model


def test_a_channel_made_large_in_this_batch_only():
    model = with_planted_channel()
    without = [{"input_ids": torch.where(t == MARKED, 8, t)} for t in (ids(4, 32, 100 + i) for i in range(3))]
    stats = calibrate(model, without, progress=False)
    marked = torch.where(ids() == MARKED, 8, ids())
    plain = marked.clone()
    marked[:, 9] = MARKED
    kept = {}
    for method in (ProbePruning(), WandaSP(), StaticPPsp()):
        prune_(model, method, stats, **SETTINGS)
        for label, text in (("marked", marked), ("plain", plain)):
            run_frozen(model, text)
            kept[method.label, label] = CHANNEL in kept_units(model)[LAYER].mlp.tolist()
        unprune_(model)
    assert kept == {
        ("pp", "marked"): True,
        ("pp", "plain"): False,
        ("wanda_sp", "marked"): False,
        ("wanda_sp", "plain"): False,
        ("ppsp", "marked"): False,
        ("ppsp", "plain"): False,
    }


def test_parallel_probing_takes_earlier_residuals():
    """Attention probes the residual before the previous layer's MLP, the MLP this layer's input."""
    model, method = tiny("llama"), RecordingProbePruning(probe_source="previous", row_ratio=1.0, token_ratio=1.0)
    prune_(model, method, statistics("llama"), **SETTINGS)
    seen = {}
    for layer in range(5):
        block = model.model.layers[layer]
        block.register_forward_pre_hook(lambda _, args, layer=layer: seen.__setitem__((layer, "in"), args[0]))
        block.post_attention_layernorm.register_forward_pre_hook(
            lambda _, args, layer=layer: seen.setdefault((layer, "middle"), args[0])
        )
    chosen = []
    original = method.select
    method.select = lambda residual, *rest, **more: (chosen.append(residual), original(residual, *rest, **more))[1]
    logits(model, ids())
    for i, layer in enumerate(PRUNED):
        attention, mlp = chosen[2 * i], chosen[2 * i + 1]
        # the first call of a pruned layer's norm is on the true residual, a later one on the probe's
        assert torch.equal(attention, seen[layer - 1, "middle"])
        assert torch.equal(mlp, seen[layer, "in"])


def test_parallel_probing_without_a_predecessor_uses_its_own_input():
    model, method = tiny("llama"), RecordingProbePruning(probe_source="previous")
    prune_(model, method, statistics("llama"), **{**SETTINGS, "skip_layers": (1, 2, 3, 4), "pruning_ratio": 0.1})
    seen, original = [], method.select
    method.select = lambda residual, *rest, **more: (seen.append(residual), original(residual, *rest, **more))[1]
    logits(model, ids())
    logits(model, ids(seed=2))
    embedded = model.get_input_embeddings()
    assert torch.equal(seen[0], embedded(ids()))
    assert torch.equal(seen[2], embedded(ids(seed=2)))  # not what the batch before left behind


def test_momentum_one_keeps_the_history_as_calibrated():
    model = tiny("llama")
    prune_(model, ProbePruning(momentum=1.0), statistics("llama"), **SETTINGS)
    before = histories(model)
    logits(model, ids())
    assert all(torch.equal(history, before[key]) for key, history in histories(model).items())


@pytest.mark.parametrize("sizes", [(20, 1024, 1, 512), (1, 5, 1, 3), (21, 64, 2, 32)])
def test_probe_sizes(sizes):
    rows, tokens, *expected = sizes
    assert list(ProbePruning().probe_sizes(rows, tokens)) == expected


def test_fixed_fusion_weights_choose_differently():
    chosen = []
    for weight in (0.0, 1.0):
        model = tiny("llama")
        prune_(model, ProbePruning(fusion_weight=weight), statistics("llama"), **SETTINGS)
        logits(model, ids())
        chosen.append([units.mlp.tolist() for units in kept_units(model).values()])
    assert chosen[0] != chosen[1]


@pytest.mark.parametrize("name", ["token_ratio", "row_ratio"])
@pytest.mark.parametrize("value", [0.0, -0.1, 1.1, float("nan")])
def test_probe_ratios_out_of_range(name, value):
    with pytest.raises(UserError, match=rf"{name} must be in \(0, 1\], not"):
        ProbePruning(**{name: value})


@pytest.mark.parametrize("name", ["momentum", "fusion_weight"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_weights_out_of_range(name, value):
    with pytest.raises(UserError, match=rf"{name} must be in \[0, 1\], not"):
        ProbePruning(**{name: value})


def test_unknown_choices():
    with pytest.raises(UserError, match="probe_source must be current or previous, not 'earlier'"):
        ProbePruning(probe_source="earlier")
    with pytest.raises(UserError, match="rank_by must be residual, input, random or stratified, not 'norm'"):
        ProbePruning(rank_by="norm")
