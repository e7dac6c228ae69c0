"""After OCP: which tokens are in the probe, and how many units each layer keeps."""

import pytest
import torch

from pp_lightning import UserError, kept_units, prune_, unprune_
from pp_lightning.allocation import outlier_share, spread_ratios
from pp_lightning.blocks import Block
from pp_lightning.calibration_data import fingerprint
from pp_lightning.functional.probe import token_sensitivity
from pp_lightning.methods import AfterOCP, WandaSP
from pp_lightning.pruning import pruning_of
from tests.models import LAYERS, MODELS, SETTINGS, ids, logits, masked_dense, statistics, tiny
from tests.recording import Recording


class Watched(Recording, AfterOCP):
    """After OCP, watched."""


BARE = {**SETTINGS, "skip_layers": ()}


def pruned(name="llama", method=AfterOCP, **settings):
    model = tiny(name)
    prune_(model, method(), statistics(name), **{**BARE, **settings})
    return model


@pytest.mark.parametrize("name", MODELS)
def test_equals_masked_dense_and_can_be_undone(name):
    model = pruned(name, lambda: AfterOCP(row_ratio=0.5))
    assert model.config._attn_implementation == "eager"
    found = logits(model, ids())
    units = pruning_of(model).plan.blocks[0].units.number
    expected = logits(masked_dense(tiny(name), kept_units(model), units), ids())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    unprune_(model)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model, ids()), logits(tiny(name), ids()))


def test_sensitivity_is_that_of_a_loop():
    generator = torch.Generator().manual_seed(0)
    states, weights = torch.randn(2, 3, 5, generator=generator), torch.randn(7, 5, generator=generator)
    found = token_sensitivity(states, weights.square().sum(0))
    for row in range(2):
        for token in range(3):
            total = sum((states[row, token, d] * weights[c, d]) ** 2 for d in range(5) for c in range(7))
            assert found[row, token] == pytest.approx(float(total.sqrt()), rel=1e-5)


def test_a_planted_outlier_token_is_in_the_mlps_probe():
    # The token's residual is short, so that norms do not pick it, but it has all it has where the first matrices look.
    model = pruned(method=lambda: AfterOCP(token_ratio=0.1, row_ratio=0.25))
    block = pruning_of(model).pruners[0, Block.MLP]
    source = torch.ones(4, 24, 64)
    weight = block.input_norm
    loud = int(weight.argmax())
    source[2, 23] = 0.0
    source[2, 23, loud] = 3.0 * float(weight.sum() / weight[loud]) ** 0.5
    importance = token_sensitivity(source, weight)
    probe = block.method.select(source, source, None, importance=importance, mixes_tokens=False)
    assert 23 in probe.tokens.tolist() and probe.rows.tolist() == [2]


def test_attentions_probe_has_the_tokens_that_got_most_attention_in_the_layer_in_front():
    method, seen = Watched(token_ratio=0.25), []
    model = pruned(method=lambda: method)
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda m, args, out: seen.append(out[1].sum((1, 2))))
    logits(model, ids())
    records = method.taken(tuple(range(LAYERS)))
    for layer in range(1, LAYERS):
        attended = seen[layer - 1]
        expected = torch.linalg.vector_norm(attended, dim=0).topk(6).indices.sort().values
        assert torch.equal(records[layer, "attention"].probe.tokens, expected)


def test_ratios_keep_their_mean_and_favour_outliers():
    shares = torch.tensor([0.1, 0.3, 0.2])
    ratios = spread_ratios(0.4, shares, 0.08)
    assert ratios.mean() == pytest.approx(0.4)
    assert ratios.tolist() == pytest.approx([0.48, 0.32, 0.40])
    assert spread_ratios(0.4, torch.full((3,), 0.2), 0.08).tolist() == pytest.approx([0.4] * 3)
    assert outlier_share(torch.tensor([1.0] * 9 + [91.0])) == pytest.approx(0.1)


@pytest.mark.parametrize(("method", "allocation"), [(AfterOCP, None), (WandaSP, "outliers")])
def test_layers_with_outliers_keep_more_channels(method, allocation):
    model, stats = tiny("llama"), statistics("llama")
    with torch.no_grad():
        for layer in range(LAYERS):
            weight = model.model.layers[layer].mlp.down_proj.weight
            weight /= stats.energy(layer, Block.MLP).sqrt() * weight.norm(dim=0)  # all channels alike: no outliers
        model.model.layers[3].mlp.down_proj.weight[:, ::20] *= 12
    stats.model = fingerprint(model)
    prune_(model, method(), stats, allocation=allocation, **{**BARE, "round_to": 1})
    keep = {layer: pruning_of(model).keep[layer, Block.MLP] for layer in range(LAYERS)}
    assert all(keep[3] > keep[layer] for layer in (0, 1, 2, 4))


@pytest.mark.parametrize("setting", [{"token_ratio": 0.0}, {"row_ratio": 1.5}, {"momentum": -1.0}])
def test_impossible_settings(setting):
    with pytest.raises(UserError, match="must be in"):
        AfterOCP(**setting)
