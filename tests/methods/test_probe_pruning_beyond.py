"""What Probe Pruning can do beyond the paper: restored means, drawn probes, other scores."""

import pytest
import torch

from pp_lightning import UserError, kept_units, prune_, unprune_
from pp_lightning.blocks import Block
from pp_lightning.families import blocks_of
from pp_lightning.functional.draws import ScatteredProbe
from pp_lightning.functional.probe import Probe
from pp_lightning.functional.selection import unit_channels
from pp_lightning.methods import ProbePruning
from pp_lightning.pruned.choice import Choice
from pp_lightning.pruning import last_choices
from tests.models import (
    MODELS,
    PRUNED,
    SETTINGS,
    choices,
    held_by,
    ids,
    logits,
    pruned_blocks,
    ragged,
    statistics,
    tiny,
)
from tests.recording import RecordingProbePruning

WHOLE = {"row_ratio": 1.0, "token_ratio": 1.0}


def pruned(name, method, **settings):
    model = tiny(name)
    prune_(model, method, statistics(name), **{**SETTINGS, **settings})
    return model


def with_means_in_place(name, kept, mean_of):
    """A dense model in which every pruned channel is replaced by ``mean_of(key, states)`` before the output matrix."""
    model = tiny(name)
    for layer, units in kept.items():
        for block in Block:
            modules = blocks_of(model)[layer, block]
            numbers = getattr(units, block.value)
            width = 1 if block is Block.MLP else modules.output_weight.shape[1] // (4 if name == "llama_gqa" else 8)
            stays = torch.zeros(modules.output_weight.shape[1], dtype=torch.bool)
            stays[unit_channels(numbers, width)] = True

            def replace(_, inputs, key=(layer, block), stays=stays):
                states = inputs[0]
                return (torch.where(stays, states, mean_of(key, states)),)

            modules.projection(modules.output).register_forward_pre_hook(replace)
    return model


@pytest.mark.parametrize("name", ["llama", "llama_gqa", "opt"])
@pytest.mark.parametrize("score", ["ppsp", "energy", "centered"])
def test_restores_the_mean_of_the_batch(name, score):
    """With a probe of everything: pruned channels then contribute exactly what their mean over the batch does."""
    model = pruned(name, ProbePruning(**WHOLE, compensation="probe", score=score))
    found = logits(model, ids())
    kept = kept_units(model)
    expected = with_means_in_place(name, kept, lambda _, states: states.flatten(0, -2).mean(0))
    torch.testing.assert_close(found, logits(expected, ids()), rtol=1e-4, atol=1e-4)
    unrestored = with_means_in_place(name, kept, lambda _, states: torch.zeros(states.shape[-1]))
    assert not torch.allclose(found, logits(unrestored, ids()), rtol=1e-2, atol=1e-2)


def test_restores_the_running_mean():
    model = pruned("llama", ProbePruning(compensation="history", momentum=1.0))
    found = logits(model, ids())
    calibrated = {key: statistics("llama").channel_moments(*key)[0] for key in pruned_blocks(model)}
    expected = with_means_in_place("llama", kept_units(model), lambda key, _: calibrated[key])
    torch.testing.assert_close(found, logits(expected, ids()), rtol=1e-4, atol=1e-4)


def test_running_means_move_where_channels_are_kept():
    model = pruned("llama", ProbePruning(compensation="history", momentum=0.5))
    before = {key: block.mean.clone() for key, block in pruned_blocks(model).items()}
    logits(model, ids())
    kept = last_choices(model)
    for (_, name), block in pruned_blocks(model).items():
        channels = unit_channels(kept[_, name].kept, block.units.channels)
        moved = block.mean != before[_, name]
        assert moved[channels].all()
        assert moved.sum() == len(channels)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_part_in_the_mean(side):
    """Rows without padding, one by one in a batch of their own, against the same rows padded."""
    lengths = [12, 12, 12]
    batch = ragged(lengths, side)
    wide = {key: torch.nn.functional.pad(value, (3, 0) if side == "left" else (0, 3)) for key, value in batch.items()}
    method = ProbePruning(**WHOLE, compensation="probe", score="centered")
    plain, padded_model = pruned("llama", method), pruned("llama", method)
    found = logits(padded_model, wide["input_ids"], attention_mask=wide["attention_mask"])
    expected = logits(plain, batch["input_ids"])
    real = wide["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected.flatten(0, 1), rtol=1e-4, atol=1e-4)
    assert choices(kept_units(padded_model)) == choices(kept_units(plain))


def naive_centred(states, history, weight, about):
    """``sum_t (w mean_b x^2 + (1 - w) H - 2 m mu + m^2)`` for every channel, in loops; mu over rows and positions."""
    rows, tokens, channels = states.shape
    result = []
    for c in range(channels):
        mu = sum(states[b, t, c].item() for b in range(rows) for t in range(tokens)) / (rows * tokens)
        m = mu if about is None else about[c].item()
        total = 0.0
        for t in range(tokens):
            square = sum(states[b, t, c].item() ** 2 for b in range(rows)) / rows
            total += weight * square + (1 - weight) * history[t, c].item() - 2 * m * mu + m * m
        result.append(max(total, 0.0))
    return torch.tensor(result)


@pytest.mark.parametrize("compensation", ["probe", "history"])
def test_centred_score_is_what_is_lost_about_the_restored_mean(compensation):
    method = ProbePruning(**WHOLE, score="centered", compensation=compensation, fusion_weight=0.3)
    states, history, running = torch.randn(3, 5, 6) + 1, torch.rand(8, 6) + 1.5, torch.rand(6)
    probe = Probe(torch.arange(3), torch.arange(5))
    sight = method.observe(states, probe, None, history, running)
    about = running if compensation == "history" else None
    torch.testing.assert_close(sight.energy, naive_centred(states, history, 0.3, about), rtol=1e-4, atol=1e-4)
    expected = running if compensation == "history" else states.mean((0, 1))
    torch.testing.assert_close(sight.restored, expected)
    plain = ProbePruning(**WHOLE, score="energy", compensation=compensation, fusion_weight=0.3)
    assert (plain.observe(states, probe, None, history, running).energy > sight.energy).any()


def test_energy_scores_equal_the_naive_loop():
    weight, energy = torch.randn(5, 6), torch.rand(6)
    method = ProbePruning(score="energy")
    for width in (1, 2, 3):
        scores = method.unit_scores(energy, method.weight_norm(weight), width)
        naive = [
            sum(energy[c].item() * sum(w.item() ** 2 for w in weight[:, c]) for c in range(u * width, (u + 1) * width))
            for u in range(6 // width)
        ]
        torch.testing.assert_close(scores, torch.tensor(naive), rtol=1e-5, atol=0)


@pytest.mark.parametrize("rank", ["random", "stratified"])
def test_draws_follow_the_seed_and_differ_between_batches_layers_and_blocks(rank):
    def drawn(seed):
        method = RecordingProbePruning(rank_by=rank, seed=seed)
        model = pruned("llama", method)
        torch.manual_seed(seed + 17)  # nobody else's randomness
        for _ in range(2):
            logits(model, ids())
        return [record.probe.tokens.tolist() for record in method.records]

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert first == again
    assert first != other
    assert len({tuple(tokens) for tokens in first}) == len(first) == 2 * 2 * len(PRUNED)


def test_scattered_probe_is_the_mlps_alone_and_as_large():
    method = RecordingProbePruning(scattered_mlp=True, row_ratio=0.5, token_ratio=0.25)
    model = pruned("llama", method)
    logits(model, ids())
    for record in method.records[::2]:
        assert isinstance(record.probe, Probe)
        assert record.states.shape[:2] == (2, 6)
    for record in method.records[1::2]:
        assert isinstance(record.probe, ScatteredProbe)
        assert record.states.shape[:2] == (1, 12)


def test_scattered_probe_shows_the_dense_states_of_its_tokens():
    method = RecordingProbePruning(scattered_mlp=True, blocks=("mlp",))
    settings = {**SETTINGS, "skip_layers": (0, 1, 3, 4), "pruning_ratio": 0.1}
    caught = []
    dense, model = tiny("llama"), tiny("llama")
    prune_(model, method, statistics("llama"), **settings)
    dense.model.layers[2].mlp.down_proj.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    logits(dense, ids())
    logits(model, ids())
    record = method.records[0]
    torch.testing.assert_close(record.states, record.probe.take(caught[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", ["random", "stratified"])
def test_drawn_probes_run_on_padded_batches(rank):
    method = RecordingProbePruning(
        rank_by=rank, row_ratio=0.5, scattered_mlp=True, score="centered", compensation="probe", fusion_weight=0.5
    )
    model = pruned("llama", method)
    batch = ragged([24, 3, 11, 7], "left")
    found = logits(model, batch["input_ids"], attention_mask=batch["attention_mask"])
    assert torch.isfinite(found).all()
    real = batch["attention_mask"].bool()
    for record in method.records[1::2]:
        probe = record.probe
        assert real[probe.rows, probe.tokens][probe.real[0]].all()


def test_a_held_choice_holds_what_it_restores():
    model = pruned("llama", ProbePruning(compensation="probe"))
    text = ids(2, 12)
    with torch.no_grad():
        filled = model(input_ids=text, use_cache=True).past_key_values
        model(input_ids=text[:, :1], past_key_values=filled, use_cache=True)
    chosen = filled.pruning_choice.choices
    for block, choice, held in zip(pruned_blocks(model).values(), chosen, held_by(filled), strict=True):
        assert choice.restored.abs().sum() > 0
        torch.testing.assert_close(held[block.runner.modules.output].bias, choice.restored)


def test_bias_of_the_output_matrix_stays():
    model = pruned("opt", ProbePruning(compensation="probe"))
    runner = pruned_blocks(model)[2, Block.MLP].runner
    own = runner.output.module.bias.clone()
    weights = runner.slices.of(Choice(torch.arange(4), torch.ones(64)), output_alone=True)
    torch.testing.assert_close(weights["fc2"].bias, own + 1)
    logits(model, ids())
    assert torch.equal(runner.output.module.bias, own)  # and no weight changes


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("preset", ["paper", "best"])
def test_presets_run_on_every_architecture_and_undo(name, preset):
    dense, model = tiny(name), tiny(name)
    prune_(model, getattr(ProbePruning, preset)(), statistics(name), **SETTINGS)
    assert not torch.allclose(logits(model, ids()), logits(dense, ids()), atol=1e-3)
    unprune_(model)
    assert torch.equal(logits(model, ids()), logits(dense, ids()))


def test_paper_is_the_default():
    assert ProbePruning.paper().settings() == ProbePruning().settings()
    assert ProbePruning.best().settings() != ProbePruning().settings()
    assert ProbePruning.best(seed=3).seed == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "change"),
    [
        ("padded", {}),
        ("whole", {"scattered_mlp": True}),
        ("padded", {"compensation": "history"}),
        ("whole", {"rank_by": "random"}),
    ],
)
def test_a_layer_of_the_best_settings_traces_into_one_graph(batch, change):
    def model_and_logits(compiled):
        model = pruned("llama", ProbePruning(**{**ProbePruning.best().settings(), **change}))
        torch._dynamo.reset()
        for layer in model.model.layers:
            if compiled:
                layer.compile(fullgraph=True, backend="eager")
        given = ragged([24, 20, 9, 24], "left")
        mask = {"attention_mask": given["attention_mask"]} if batch == "padded" else {}
        return [logits(model, given["input_ids"], **mask) for _ in range(2)], choices(kept_units(model))

    (eager, chosen), (graph, chosen_in_graph) = model_and_logits(False), model_and_logits(True)
    assert chosen == chosen_in_graph
    for found, expected in zip(graph, eager, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rank_by": "norm"}, "rank_by must be residual, input, random or stratified, not 'norm'"),
        ({"score": "wanda"}, "score must be ppsp, energy or centered, not 'wanda'"),
        ({"compensation": "bias"}, "compensation must be probe or history, not 'bias'"),
        ({"allocation": "local"}, "allocation must be uniform or global, not 'local'"),
    ],
)
def test_unknown_names(setting, message):
    with pytest.raises(UserError, match=message):
        ProbePruning(**setting)


def test_running_means_need_calibrated_means():
    stats = statistics("llama")
    for sums in stats.sums.values():
        sums.values = None
    with pytest.raises(UserError, match="means"):
        prune_(tiny("llama"), ProbePruning(compensation="history"), stats, **SETTINGS)
