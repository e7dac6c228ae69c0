import copy

import pytest
import torch

from pp_lightning import Statistics, UserError, calibrate, kept_units, prune_
from pp_lightning.blocks import Block
from pp_lightning.families import blocks_of
from pp_lightning.methods import FLAP, FullBatchProbing, ProbePruning
from tests.models import LAYERS, MODELS, calibration_batches, ids, logits, padded, ragged, statistics, tiny


def assert_same(found: Statistics, expected: Statistics) -> None:
    """Bit for bit."""
    assert (found.model, found.num_batches, found.batches_digest) == (
        expected.model,
        expected.num_batches,
        expected.batches_digest,
    )
    assert torch.equal(found.counts, expected.counts)
    assert found.sums.keys() == expected.sums.keys()
    for key, sums in expected.sums.items():
        assert torch.equal(found.sums[key].squares, sums.squares), key
        assert torch.equal(found.sums[key].values, sums.values), key
        assert torch.equal(found.sums[key].shift, sums.shift), key
        assert torch.equal(found.sums[key].spread, sums.spread), key
        assert torch.equal(found.residuals[key], expected.residuals[key]), key


NORMS = {  # in front of attention and MLP
    "opt": ("self_attn_layer_norm", "final_layer_norm"),
    None: ("input_layernorm", "post_attention_layernorm"),
}


def states_of(model, batch, layer: int, block: Block, part: str = "output") -> torch.Tensor:
    """The input (B, S, C) of a block's output matrix (or of its norm), caught with a hook of our own."""
    caught = []
    modules = blocks_of(model)[layer, block]
    norm = NORMS.get(model.config.model_type, NORMS[None])[block is Block.MLP]
    module = modules.projection(modules.output) if part == "output" else getattr(modules.layer, norm)
    hook = module.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    with torch.no_grad():
        model(**batch, use_cache=False)
    hook.remove()
    return caught[0].view(*batch["input_ids"].shape, -1)


@pytest.mark.parametrize("name", MODELS)
def test_equals_naive_loops(name):
    model = tiny(name)
    batches = [
        {"input_ids": ids(2, 7, 1)},
        ragged([5, 9, 3], "left", 2),
        ragged([4, 6], "right", 3),
    ]
    found = calibrate(model, batches, progress=False)
    assert found.sums.keys() == {(layer, block) for layer in range(LAYERS) for block in Block}
    assert found.num_batches == 3
    for layer, block in ((0, Block.ATTENTION), (3, Block.MLP)):
        values, squares = torch.zeros(9, 160).double(), torch.zeros(9, 160).double()
        counts, energy = [0] * 9, torch.zeros(9).double()
        for batch in batches:
            states = states_of(model, batch, layer, block).double()
            residual = states_of(model, batch, layer, block, "norm").double()
            width = states.shape[2]
            for b in range(states.shape[0]):
                mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[b].tolist()
                position = 0
                for t, real in enumerate(mask):
                    if real:
                        values[position, :width] += states[b, t]
                        squares[position, :width] += states[b, t] ** 2
                        energy[position] += (residual[b, t] ** 2).sum()
                        counts[position] += 1
                        position += 1
        assert found.counts.tolist() == counts
        torch.testing.assert_close(found.sums[layer, block].squares, squares[:, :width].float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.sums[layer, block].values, values[:, :width].float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.residuals[layer, block], energy.float(), rtol=1e-5, atol=1e-5)


def offset(by: float):
    """OPT whose MLP channels have means of so many standard deviations, and the batches that tell."""
    model, batches = tiny("opt"), [*calibration_batches(4), ragged([20, 9, 31], "left"), ragged([12, 40], "right")]
    for layer in model.model.decoder.layers:
        inputs = []
        hook = layer.fc1.register_forward_hook(lambda _, __, output, inputs=inputs: inputs.append(output))
        logits(model, batches[0]["input_ids"])
        hook.remove()
        spread = inputs[0].flatten(0, -2).std(0)
        with torch.no_grad():
            layer.fc1.bias += by * spread - inputs[0].flatten(0, -2).mean(0)
            layer.fc2.bias -= layer.fc2.weight @ (by * spread)
    return model, batches


def exactly(model, batches, layer):
    """States (N, C) of an MLP's real tokens, and their positions (N,): float64."""
    states, positions = [], []
    for batch in batches:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        states.append(states_of(model, batch, layer, Block.MLP)[mask].double())
        positions.append((mask.long().cumsum(1) - 1)[mask])
    return torch.cat(states), torch.cat(positions)


@pytest.mark.parametrize("by", [0.0, 30.0, 100.0, 1000.0])
def test_deviations_from_a_mean_that_is_far_from_zero(by):
    model, batches = offset(by)
    found = calibrate(model, batches, progress=False)
    for layer in range(LAYERS):
        states, positions = exactly(model, batches, layer)
        variance = states.var(0, unbiased=False)
        if by:
            assert (states.mean(0).abs() / variance.sqrt()).median() > by / 4
        torch.testing.assert_close(found.variance(layer, Block.MLP), variance.float(), rtol=1e-4, atol=1e-8)
        deviations = (states - states.mean(0)).square()
        expected = torch.zeros(40, states.shape[1]).double().index_add(0, positions, deviations)
        expected /= found.counts[:, None]
        error = (found.deviations(layer, Block.MLP) - expected) / variance  # a position with one token may have any
        assert error.abs().max() < 3e-4


@pytest.mark.parametrize("by", [30.0, 100.0, 1000.0])
def test_choices_about_such_a_mean_are_those_of_float64(by):
    model, batches = offset(by)
    stats, dense = calibrate(model, batches, progress=False), copy.deepcopy(model)
    settings = {"pruning_ratio": 0.4, "skip_layers": (0, 1), "round_to": 1}
    prune_(model, FLAP(blocks=("mlp",), uniform=True), stats, **settings)
    for layer, kept in kept_units(model).items():
        states, _ = exactly(dense, batches, layer)
        weight = blocks_of(dense)[layer, Block.MLP].output_weight.double()
        scores = states.var(0, unbiased=False) * weight.square().sum(0)
        assert kept.mlp.tolist() == scores.topk(len(kept.mlp)).indices.sort().values.tolist()


@pytest.mark.parametrize("name", ["llama", "mistral", "opt"])
@pytest.mark.parametrize(("left", "right"), [(5, 0), (0, 5), (3, 2)])
def test_padding_does_not_change_the_statistics(name, left, right):
    model = tiny(name)
    plain = calibrate(model, [{"input_ids": ids(3, 20)}], progress=False)
    found = calibrate(model, [padded(ids(3, 20), left, right)], progress=False)
    assert torch.equal(found.counts, plain.counts)  # no position more, either
    for key, sums in plain.sums.items():
        torch.testing.assert_close(found.sums[key].squares, sums.squares, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.sums[key].values, sums.values, rtol=1e-4, atol=1e-5)


def test_a_mask_of_ones_is_no_padding():
    model = tiny("llama")
    batch = {"input_ids": ids(3, 20)}
    masked = dict(batch, attention_mask=torch.ones(3, 20, dtype=torch.long))
    plain, found = (calibrate(model, [b], progress=False) for b in (batch, masked))
    for key, sums in plain.sums.items():
        assert torch.equal(found.sums[key].squares, sums.squares)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_have_float32_statistics(dtype):
    exact = calibrate(tiny("llama"), calibration_batches(), progress=False)
    found = calibrate(tiny("llama").to(dtype), calibration_batches(), progress=False)
    for key, sums in found.sums.items():
        assert sums.squares.dtype == sums.values.dtype == torch.float32
        torch.testing.assert_close(sums.squares.sum(), exact.sums[key].squares.sum(), rtol=0.02, atol=0)


def test_means_are_optional():
    found = calibrate(tiny("llama"), calibration_batches(1), means=False, progress=False)
    assert all(sums.values is None for sums in found.sums.values())


def test_some_layers_only():
    model = tiny("llama")
    everything = calibrate(model, calibration_batches(1), progress=False)
    found = calibrate(model, calibration_batches(1), layers=(3, 4), progress=False)
    assert found.sums.keys() == {(layer, block) for layer in (3, 4) for block in Block}
    assert torch.equal(found.sums[3, Block.MLP].squares, everything.sums[3, Block.MLP].squares)


def test_the_model_is_left_as_it_was():
    model = tiny("opt").train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    found = calibrate(model, calibration_batches(1), progress=False)
    assert model.training
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks
    # in evaluation mode while it ran: no dropout
    assert_same(found, calibrate(tiny("opt"), calibration_batches(1), progress=False))


class Killed(Exception):  # noqa: N818 (an interruption, not an error)
    """Stands for whatever ends a run half way."""


def killed_after(batches, number):
    for index, batch in enumerate(batches):
        if index == number:
            raise Killed
        yield batch


@pytest.mark.parametrize("killed_at", [2, 3, 5])
def test_resumed_bit_for_bit(tmp_path, killed_at):
    batches = [*calibration_batches(3), ragged([9, 4], "left"), *calibration_batches(2, tokens=40)]
    path = tmp_path / "stats"
    uninterrupted = calibrate(tiny("llama"), batches, progress=False)
    model = tiny("llama")
    with pytest.raises(Killed):
        calibrate(model, killed_after(batches, killed_at), save_to=path, save_every=2, progress=False)
    assert Statistics.load(path).num_batches == killed_at // 2 * 2
    assert not any(module._forward_pre_hooks for module in model.modules())
    resumed = calibrate(model, batches, save_to=path, save_every=2, progress=False)
    assert_same(resumed, uninterrupted)
    assert_same(Statistics.load(path), uninterrupted)


def test_what_is_told_to_end_between_batches_has_saved_them(tmp_path):
    """Not so in the middle of one, see above."""
    batches = calibration_batches(5)

    def ended(number):
        yield from batches[:number]
        raise SystemExit

    for number in (0, 1, 3):
        with pytest.raises(SystemExit):
            calibrate(tiny("llama"), ended(number), save_to=tmp_path / "stats", progress=False)
        assert (tmp_path / "stats").exists() == (number > 0)
        assert number == 0 or Statistics.load(tmp_path / "stats").num_batches == number
    resumed = calibrate(tiny("llama"), batches, save_to=tmp_path / "stats", progress=False)
    assert_same(resumed, calibrate(tiny("llama"), batches, progress=False))


def test_ended_inside_of_a_batch_the_file_is_as_it_was(tmp_path):
    model, calls = tiny("llama"), []

    def end(*_):
        calls.append(1)
        if len(calls) == 4:
            raise SystemExit

    model.model.layers[3].register_forward_pre_hook(end)
    with pytest.raises(SystemExit):
        calibrate(model, calibration_batches(5), save_to=tmp_path / "stats", save_every=2, progress=False)
    assert Statistics.load(tmp_path / "stats").num_batches == 2
    resumed = calibrate(tiny("llama"), calibration_batches(5), save_to=tmp_path / "stats", progress=False)
    assert_same(resumed, calibrate(tiny("llama"), calibration_batches(5), progress=False))


def test_a_finished_file_is_not_collected_again(tmp_path):
    batches = calibration_batches()
    first = calibrate(tiny("llama"), batches, save_to=tmp_path / "stats", progress=False)
    model = tiny("llama")

    def refuse(*_):
        raise AssertionError("the model ran")

    model.model.register_forward_pre_hook(refuse)
    assert_same(calibrate(model, batches, save_to=tmp_path / "stats", progress=False), first)


def test_more_batches_continue_a_file(tmp_path):
    batches = calibration_batches(4)
    calibrate(tiny("llama"), batches[:2], save_to=tmp_path / "stats", progress=False)
    longer = calibrate(tiny("llama"), batches, save_to=tmp_path / "stats", progress=False)
    assert_same(longer, calibrate(tiny("llama"), batches, progress=False))


IN_OTHER_ROWS = [{"input_ids": batch["input_ids"].view(8, 16)} for batch in calibration_batches(2)]
# What a file was collected with, what is asked for, and what is said; what is not named is the same.
OTHER = {
    "batches": ({}, {"batches": [{"input_ids": ids(4, 32, 7)}] * 2}, "from other batches: name another file or remove"),
    "rows": ({}, {"batches": IN_OTHER_ROWS}, "was collected from other batches"),
    "number": ({"batches": calibration_batches(3)}, {}, "from 3 batches, more than the 2 given: remove it"),
    "model": ({}, {"model": "llama_gqa"}, "collected on another model"),
    "layers": ({"layers": (3, 4)}, {}, "covers other layers: name another file or remove it"),
    "means": ({"batches": calibration_batches(1), "means": False}, {}, "without means: name another file or remove it"),
}


@pytest.mark.parametrize("other", OTHER)
def test_a_file_of_other_things_is_refused(other, tmp_path):
    def collect(model="llama", **given):
        settings = {"batches": calibration_batches(2), "save_to": tmp_path / "stats", "progress": False}
        calibrate(tiny(model), **settings | given)

    written, asked, message = OTHER[other]
    collect(**written)
    with pytest.raises(UserError, match=message):
        collect(**asked)


def test_file_with_means_goes_on_with_them(tmp_path):
    calibrate(tiny("llama"), calibration_batches(1), save_to=tmp_path / "stats", progress=False)
    longer = calibrate(tiny("llama"), calibration_batches(2), means=False, save_to=tmp_path / "stats", progress=False)
    assert_same(longer, calibrate(tiny("llama"), calibration_batches(2), progress=False))


@pytest.mark.parametrize("layer", [LAYERS, -1])
def test_layers_that_are_not_there(layer):
    with pytest.raises(UserError, match=f"layer {layer}, but the model has layers 0 to {LAYERS - 1}"):
        calibrate(tiny("llama"), calibration_batches(1), layers=(3, layer), progress=False)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (ids(2, 8), "^calibration batches are a list of dictionaries, not one Tensor$"),
        ("some text", "^calibration batches are a list of dictionaries, not one str$"),
        ({"input_ids": ids(2, 8)}, "^calibration batches are a list of dictionaries, not one dict$"),
        ([ids(2, 8)], "^calibration batches are dictionaries with input_ids, not Tensor$"),
        (["some text"], "^calibration batches are dictionaries with input_ids, not str$"),
        ([{"ids": ids(2, 8)}], "^calibration batch 1 has no input_ids$"),
    ],
)
def test_what_is_no_batch(batches, message):
    with pytest.raises(UserError, match=message):
        calibrate(tiny("llama"), batches, progress=False)


def test_a_batch_of_padding_alone_is_refused(tmp_path):
    nothing = {"input_ids": ids(2, 8), "attention_mask": torch.zeros(2, 8, dtype=torch.long)}
    model, batches = tiny("llama"), [*calibration_batches(1), nothing]
    with pytest.raises(UserError, match=r"^calibration batch 2 is padding alone: leave it out$"):
        calibrate(model, batches, save_to=tmp_path / "stats", save_every=1, progress=False)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert Statistics.load(tmp_path / "stats").num_batches == 1
    nothing["attention_mask"][1, 3] = 1
    assert calibrate(model, batches, progress=False).counts[:2].tolist() == [5.0, 4.0]


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("shape", [(3, 8), (1, 8)], ids=["each", "shared"])
def test_statistics_are_at_the_position_ids(name, shape):
    """Of tokens that the model is run at those positions."""
    model, places = tiny(name), (torch.arange(8) + 5).expand(shape)
    batch = {"input_ids": ids(3, 8), "position_ids": places}
    found = calibrate(model, [batch], progress=False)
    assert found.counts.tolist() == [0.0] * 5 + [3.0] * 8
    for key, sums in found.sums.items():
        states = states_of(model, batch, *key)
        torch.testing.assert_close(sums.values[5:], states.sum(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sums.squares[5:], states.square().sum(0), rtol=1e-4, atol=1e-5)
        assert not sums.squares[:5].any()
    plain = calibrate(model, [{"input_ids": ids(3, 8)}], progress=False)
    same = calibrate(model, [batch | {"position_ids": torch.arange(8)[None]}], progress=False)
    assert torch.equal(same.counts, plain.counts)
    for key, sums in plain.sums.items():
        torch.testing.assert_close(same.sums[key].squares, sums.squares)


def test_positions_of_padded_rows_may_be_given(tmp_path):
    batch = ragged([9, 4], "left")
    positions = batch | {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    found, expected = (calibrate(tiny("llama"), [one], progress=False) for one in (positions, batch))
    assert torch.equal(found.counts, expected.counts)
    for key, sums in expected.sums.items():
        torch.testing.assert_close(found.sums[key].values, sums.values, rtol=1e-3, atol=1e-4)
    calibrate(tiny("llama"), [batch], save_to=tmp_path / "stats", progress=False)
    with pytest.raises(UserError, match="was collected from other batches"):
        calibrate(tiny("llama"), [positions], save_to=tmp_path / "stats", progress=False)


@pytest.mark.parametrize("positions", [torch.zeros(2, 7, dtype=torch.long), torch.full((2, 8), -1), torch.arange(8)])
def test_position_ids_that_do_not_fit(positions):
    with pytest.raises(UserError, match=r"^position_ids of calibration batch 1 are not one number from 0 a token$"):
        calibrate(tiny("llama"), [{"input_ids": ids(2, 8), "position_ids": positions}], progress=False)


def test_no_batches():
    with pytest.raises(UserError, match="no calibration batches"):
        calibrate(tiny("llama"), [], progress=False)


def test_pruned_model():
    model = tiny("llama")
    prune_(model, FullBatchProbing(), pruning_ratio=0.4, skip_layers=(0, 1))
    with pytest.raises(UserError, match="calibrate runs the dense model: unprune_ it first"):
        calibrate(model, calibration_batches(1), progress=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[5, 7] = value
    with pytest.raises(UserError, match="activations in the mlp block of layer 2 are not finite: check the checkpoint"):
        calibrate(model, calibration_batches(1), progress=False)


def test_overflow_in_half_precision():
    model = tiny("llama").half()
    with torch.no_grad():
        model.model.layers[4].mlp.up_proj.weight.mul_(1e5)
    with pytest.raises(UserError, match=r"mlp block of layer 4 are not finite: .*use float32 or bfloat16"):
        calibrate(model, calibration_batches(1), progress=False)


@pytest.mark.parametrize("method", [ProbePruning, lambda: ProbePruning(compensation="history"), FLAP])
def test_inference_mode_ends_with_the_call(method):
    """Calibrated and pruned inside of it, a model runs outside, with gradients too."""
    model = tiny("llama")
    with torch.inference_mode():
        batches = [{"input_ids": batch["input_ids"].clone()} for batch in calibration_batches()]
        stats = calibrate(model, batches, progress=False)
    for sums in stats.sums.values():
        assert not sums.squares.is_inference() and not sums.values.is_inference()
    assert_same(stats, calibrate(tiny("llama"), calibration_batches(), progress=False))
    with torch.inference_mode():
        prune_(model, method(), stats, pruning_ratio=0.4, skip_layers=(0, 1), round_to=16, release_stats=True)
    outside = tiny("llama")
    prune_(outside, method(), statistics("llama"), pruning_ratio=0.4, skip_layers=(0, 1), round_to=16)
    assert torch.equal(logits(model, ids()), logits(outside, ids()))
    model(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
    assert model.model.embed_tokens.weight.grad.isfinite().all()
