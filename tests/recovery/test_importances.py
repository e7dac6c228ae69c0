import pytest
import torch

from pp_lightning import UserError, prune_, taylor_importances
from pp_lightning.blocks import Block
from pp_lightning.families import blocks_of
from pp_lightning.methods import WandaSP
from pp_lightning.recovery import Adapters, lora_importances
from pp_lightning.recovery.adapters import down_of
from pp_lightning.recovery.importances import adapter_members
from tests.models import MODELS, SETTINGS, ids, logits, statistics, tiny

LAYER = 3
BATCHES = [{"input_ids": ids(2, 12, seed)} for seed in range(2)]


def dense_gradients(name):
    """True gradients of one layer's projections: {(block, role): (weight, gradient)}."""
    model = tiny(name)
    text = torch.cat([batch["input_ids"] for batch in BATCHES])
    model(input_ids=text, labels=text, use_cache=False).loss.backward()
    found = {}
    for block in Block:
        parts = blocks_of(model)[LAYER, block]
        for name in parts.names:
            weight = parts.projection(name).weight
            found[block, parts.role(name)] = weight.detach(), weight.grad
    return found


@pytest.mark.parametrize("name", MODELS)
def test_first_gradient_equals_the_formula(name):
    """``|c G A^T A * W|`` with the true gradient G, from a dense backward pass that LoRAPrune itself never makes."""
    found = lora_importances(tiny(name), BATCHES, rank=4, seed=7, progress=False)
    adapters = Adapters(tiny(name), rank=4, alpha=8, seed=7)
    downs = {projection: down_of(layer).detach() for projection, layer in adapters.layers()}
    for (block, role), (weight, gradient) in dense_gradients(name).items():
        down = downs[(LAYER, block), role]
        elements = (2.0 * gradient @ down.T @ down * weight).abs()
        expected = elements.sum(0 if role == "output" else 1)
        torch.testing.assert_close(found.members[LAYER, block][role], expected, rtol=1e-3, atol=1e-6)
    assert found.kind == "lora"


@pytest.mark.parametrize("other", [torch.bfloat16, torch.float64], ids=str)
def test_torchs_default_dtype_makes_no_difference(other):
    expected, model = lora_importances(tiny("llama"), BATCHES, seed=7, progress=False), tiny("llama")
    torch.set_default_dtype(other)
    found = lora_importances(model, BATCHES, seed=7, progress=False)
    assert torch.get_default_dtype() == other
    for key, members in expected.members.items():
        for role, vector in members.items():
            assert found.members[key][role].dtype == torch.float32
            torch.testing.assert_close(found.members[key][role], vector, rtol=1e-3, atol=1e-6)


def rank_correlation(one, other):
    ranks = torch.stack([one.argsort().argsort().double(), other.argsort().argsort().double()])
    return float(torch.corrcoef(ranks)[0, 1])


def test_with_full_rank_it_ranks_as_the_true_gradient_does():
    true = taylor_importances(tiny("llama"), BATCHES, progress=False)
    agreement = {}
    for rank in (1, 8, 64, 2048):
        found = lora_importances(tiny("llama"), BATCHES, rank=rank, progress=False)
        pairs = [
            (found.members[LAYER, Block.MLP][role], true.members[LAYER, Block.MLP][role]) for role in ("up", "gate")
        ]
        agreement[rank] = sum(rank_correlation(*pair) for pair in pairs) / 2
    assert agreement[2048] > 0.95  # A^T A of random rows nears a multiple of the identity
    assert agreement[1] < agreement[8] < agreement[64] < agreement[2048]
    assert agreement[1] < 0.6


def test_no_dense_gradient_is_ever_made():
    model, dense = tiny("llama"), []
    weights = list(model.parameters())
    for weight in weights:
        weight.register_hook(lambda _: dense.append(1))
    lora_importances(model, BATCHES, progress=False)
    assert not dense
    taylor_importances(model, BATCHES, progress=False)
    assert dense  # the hooks would have told


def test_the_model_is_left_as_it_was():
    model = tiny("opt").train()
    lora_importances(model, BATCHES, progress=False)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(logits(model.eval(), ids()), logits(tiny("opt"), ids()))


def test_trained_adapters_equal_the_naive_formula():
    """With B no longer zero all three terms of the estimate and the merged weight enter."""
    model = tiny("llama")
    adapters = Adapters(model, rank=3, alpha=6)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape))
    model(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
    found = adapter_members(adapters, [LAYER])
    assert {layer for layer, _ in found} == {LAYER}
    for (key, role), layer in adapters.layers():
        if key[0] == LAYER:
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            guess = b.grad @ a + b @ a.grad - b.grad @ a.grad
            elements = (guess * (layer.base_layer.weight + 2.0 * b @ a)).abs().detach()
            torch.testing.assert_close(
                found[key][role], elements.sum(0 if role == "output" else 1), rtol=1e-3, atol=1e-6
            )


class TestMistakes:
    def test_no_batches(self):
        with pytest.raises(UserError, match="no calibration batches"):
            lora_importances(tiny("llama"), [])

    def test_pruned(self):
        model = tiny("llama")
        prune_(model, WandaSP(), statistics("llama"), **SETTINGS)
        with pytest.raises(UserError, match="unprune_ it first"):
            lora_importances(model, BATCHES)

    def test_not_finite(self):
        model = tiny("llama")
        model.lm_head.weight.data[3, 3] = float("nan")
        with pytest.raises(UserError, match="adapters' gradients are not finite"):
            lora_importances(model, BATCHES, progress=False)
        assert "peft_config" not in vars(model)

    def test_without_peft(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "peft", None)
        with pytest.raises(UserError, match=r"LoRA adapters need peft: pip install 'pp-lightning\[finetune\]'"):
            lora_importances(tiny("llama"), BATCHES, progress=False)
