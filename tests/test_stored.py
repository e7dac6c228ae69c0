"""Models whose layers' weights stay on disk: the same numbers, and nothing in memory that is not used."""

from functools import partial

import pytest
import torch

from pp_lightning import LeastSquares, calibrate, prune_, unprune_
from pp_lightning.calibration_data import fingerprint
from pp_lightning.checkpoints import load_model, load_streamed
from pp_lightning.errors import UserError
from pp_lightning.families import layers_of
from pp_lightning.methods import FLAP, StaticBest, WandaSP
from pp_lightning.pruning import kept_units
from pp_lightning.stored import keep, places_in, resident
from tests.models import SETTINGS, calibration_batches, ids, logits, ragged
from tests.streamed import both, checkpoint

NAMES = ["llama", "gemma3_text", "opt"]


def in_memory(model):
    """Numbers of the layers that are in memory."""
    return sum(p.numel() for layer in layers_of(model) for p in layer.parameters() if not p.is_meta)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*NAMES, "phi3", "gpt_oss", "mixtral", "qwen3_moe"])
def test_a_streamed_model_computes_the_same_bits(tmp_path, name, dtype):
    path = str(checkpoint(tmp_path, name))
    whole, streamed = load_model(path, dtype), load_streamed(path, dtype)
    assert in_memory(streamed) == 0
    assert torch.equal(logits(whole, ids()), logits(streamed, ids()))
    assert in_memory(streamed) == 0
    assert fingerprint(whole) == fingerprint(streamed)


def test_experts_that_lie_one_by_one_on_disk_are_pruned_around(tmp_path):
    whole, streamed = both(tmp_path, "mixtral")
    names = places_in(tmp_path / "mixtral").keys() - dict(streamed.named_parameters()).keys()
    assert sum(".experts." in name for name in names) > 4
    for model in (whole, streamed):
        stats = calibrate(model, calibration_batches(), progress=False)
        prune_(model, WandaSP(blocks=("attention",)), stats, **SETTINGS, keep_dense=False)
    assert torch.equal(logits(whole, ids()), logits(streamed, ids()))
    assert in_memory(streamed) == 0


def test_one_layer_is_in_memory_at_a_time(tmp_path):
    _, model = both(tmp_path, "llama")
    seen = []
    for layer in layers_of(model):
        layer.mlp.register_forward_pre_hook(lambda *_: seen.append(in_memory(model)))
    logits(model, ids())
    one = sum(p.numel() for p in layers_of(model)[0].parameters())
    assert seen == [one] * len(layers_of(model))


def test_changes_are_kept_on_disk(tmp_path):
    _, model = both(tmp_path, "llama")
    layer, before = layers_of(model)[1], logits(model, ids())
    with resident(layer), torch.no_grad():
        layer.mlp.up_proj = torch.nn.Linear(64, 160, bias=False)
        after = logits(model, ids())
    assert not torch.equal(before, after)
    keep(layer, tmp_path / "layer.safetensors")
    assert in_memory(model) == 0 and torch.equal(logits(model, ids()), after)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_statistics_are_the_same_bits(tmp_path, name, padded):
    whole, streamed = both(tmp_path, name)
    batches = [ragged([9, 4, 7], "left", seed=n) for n in range(3)] if padded else calibration_batches()
    expected = calibrate(whole, batches, progress=False)
    for folder in (None, tmp_path / "states"):
        found = calibrate(streamed, batches, progress=False, folder=folder)
        assert torch.equal(found.counts, expected.counts) and found.batches_digest == expected.batches_digest
        assert found.sums.keys() == expected.sums.keys()
        for key, sums in expected.sums.items():
            for own, other in zip(vars(sums).values(), vars(found.sums[key].read()).values(), strict=True):
                assert torch.equal(own, other)
            assert torch.equal(expected.residuals[key], found.residuals[key])


@pytest.mark.parametrize("method", [WandaSP(), FLAP(), StaticBest(), StaticBest("uniform", bias=True)])
@pytest.mark.parametrize("name", NAMES)
def test_choices_and_weights_are_the_same_bits(tmp_path, name, method):
    whole, streamed = both(tmp_path, name)
    batches, text = calibration_batches(), ids(seed=5)
    dense = logits(whole, text)
    for model, folder in ((whole, None), (streamed, tmp_path / "states")):
        update = LeastSquares(batches, folder=folder) if method.updates else None
        stats = calibrate(model, batches, progress=False, folder=folder)
        prune_(model, method, stats, **SETTINGS, update=update, folder=folder)
    assert str(kept_units(whole)) == str(kept_units(streamed))
    pruned = logits(whole, text)
    assert in_memory(streamed) == 0
    assert torch.equal(pruned, logits(streamed, text)) and not torch.equal(pruned, dense)
    unprune_(streamed)
    assert torch.equal(logits(streamed, text), dense)


@pytest.mark.parametrize("how", ["missing", "cut", "half"])
def test_a_damaged_checkpoint_is_one_line(tmp_path, how):
    path = checkpoint(tmp_path, "llama")
    shard = sorted(path.glob("model-*"))[3]
    model = load_streamed(str(path)) if how == "half" else None
    use = partial(load_streamed, str(path)) if model is None else partial(logits, model, ids())
    if how == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-100])
    says = (
        r"^[^\n]* lacks model-[^\n]*copy it there$" if how == "missing" else r"^cannot read [^\n]*safetensors: [^\n]*$"
    )
    with pytest.raises(UserError, match=says):
        use()
