import pytest
import torch

from pp_lightning import UserError, prune_, taylor_importances
from pp_lightning.blocks import Block
from pp_lightning.families import blocks_of
from pp_lightning.functional.taylor import Taylor
from pp_lightning.methods import LLMPruner, WandaSP
from tests.models import MODELS, SETTINGS, ids, ragged, statistics, tiny

LAYER = 3


def naive(model, batches, taylor):
    """Every element of one layer's projections, from dense gradients that are kept whole: {(block, role): vector}."""
    parts = {block: blocks_of(model)[LAYER, block] for block in Block}
    weights = {(block, p.role(name)): p.projection(name).weight for block, p in parts.items() for name in p.names}
    rows = [{k: v[i : i + 1] for k, v in batch.items()} for batch in batches for i in range(len(batch["input_ids"]))]
    squares = {key: torch.zeros_like(weight, dtype=torch.float64) for key, weight in weights.items()}
    total = {key: torch.zeros_like(weight, dtype=torch.float64) for key, weight in weights.items()}
    tokens = 0
    for row in rows:
        labels = row["input_ids"].masked_fill(row.get("attention_mask", torch.ones(1)) == 0, -100)
        predicted = int((labels[:, 1:] != -100).sum())
        loss = model(**row, labels=labels, use_cache=False).loss
        for key, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            squares[key] += gradient.double() ** 2 / len(rows)
            total[key] += gradient.double() * predicted
        tokens += predicted
    found = {}
    for key, weight in weights.items():
        w, g, a = weight.detach().double(), total[key] / tokens, squares[key]
        element = {
            Taylor.VECTORIZE: w * g,
            Taylor.PARAM_FIRST: (w * g).abs(),
            Taylor.PARAM_SECOND: (w * a * w).abs(),
            Taylor.PARAM_MIX: (w * g - 0.5 * w * a * w).abs(),
        }[taylor]
        found[key] = element.sum(0 if key[1] == "output" else 1).abs()
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("taylor", Taylor)
def test_equals_dense_gradients(name, taylor):
    batches = [{"input_ids": ids(3, 12)}]
    found = taylor_importances(tiny(name), batches, taylor, progress=False)
    expected = naive(tiny(name), batches, taylor)
    for (block, role), vector in expected.items():
        torch.testing.assert_close(found.members[LAYER, block][role].double(), vector, rtol=1e-3, atol=1e-7)
    assert found.kind == taylor.value
    assert {layer for layer, _ in found.members} == set(range(5))


@pytest.mark.parametrize("taylor", Taylor)
def test_batches_of_different_lengths_are_one_mean(taylor):
    """The loss is the mean over all tokens, not over batches; padding is no token."""
    batches = [ragged([12, 7], "right"), ragged([5, 9, 20], "right", seed=7)]
    found = taylor_importances(tiny("llama_gqa"), batches, taylor, progress=False)
    for (block, role), vector in naive(tiny("llama_gqa"), batches, taylor).items():
        torch.testing.assert_close(found.members[LAYER, block][role].double(), vector, rtol=1e-3, atol=1e-7)
    other = taylor_importances(tiny("llama_gqa"), batches[:1], taylor, progress=False)
    assert not torch.allclose(other.members[LAYER, Block.MLP]["up"], found.members[LAYER, Block.MLP]["up"], rtol=0.05)


@pytest.mark.parametrize("taylor", Taylor)
def test_the_model_is_left_as_it_was(taylor):
    model = tiny("opt").train()
    model.model.decoder.layers[1].fc1.weight.requires_grad_(False)
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    taylor_importances(model, [{"input_ids": ids()}], taylor, layers=[2], progress=False)
    assert model.training
    assert all("forward" not in vars(layer) for layer in model.model.decoder.layers)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1]


@pytest.mark.parametrize(("number", "most"), [(1, 1), (3, 35)])
def test_gradients_do_not_pile_up(number, most):
    """One batch: never two matrices' gradients at once. Several: one gradient of each, and never of anything else."""
    model, seen = tiny("llama"), []
    weights = [p for p in model.parameters() if p.dim() == 2]
    for weight in weights:
        weight.register_post_accumulate_grad_hook(lambda _: seen.append(sum(w.grad is not None for w in weights)))
    taylor_importances(model, [{"input_ids": ids(seed=n)} for n in range(number)], progress=False)
    assert max(seen) == most  # 5 layers of 7 projections
    assert model.model.embed_tokens.weight.grad is None


def test_bfloat16_is_close():
    batches = [{"input_ids": ids(4, 24)}]
    exact = taylor_importances(tiny("llama"), batches, progress=False).members[LAYER, Block.MLP]["up"]
    rough = taylor_importances(tiny("llama").bfloat16(), batches, progress=False).members[LAYER, Block.MLP]["up"]
    assert rough.dtype == torch.float32
    assert torch.corrcoef(torch.stack([exact, rough]))[0, 1] > 0.98


class TestMistakes:
    def test_no_batches(self):
        with pytest.raises(UserError, match="no calibration batches"):
            taylor_importances(tiny("llama"), [])

    def test_pruned(self):
        model = tiny("llama")
        prune_(model, WandaSP(), statistics("llama"), **SETTINGS)
        with pytest.raises(UserError, match="unprune_ it first"):
            taylor_importances(model, [{"input_ids": ids()}])

    def test_loss_is_not_finite(self):
        model = tiny("llama")
        model.lm_head.weight.data[3, 3] = float("inf")
        with pytest.raises(UserError, match="loss on the calibration text is not finite"):
            taylor_importances(model, [{"input_ids": ids()}], progress=False)
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_gradients_are_not_finite(self):
        model = tiny("llama")
        model.model.layers[2].mlp.up_proj.register_full_backward_hook(
            lambda *_: (torch.full((4, 24, 64), float("nan")),)
        )
        with pytest.raises(UserError, match=r"gradients in the .* block of layer [012] are not finite"):
            taylor_importances(model, [{"input_ids": ids()}], progress=False)


@pytest.mark.parametrize("taylor", ["vectorize", "param_first", "param_second", "param_mix"])
def test_a_variant_by_its_name(taylor):
    """As the method has it."""
    batches = [{"input_ids": ids(2, 12)}]
    found = taylor_importances(tiny("llama"), batches, taylor, progress=False)
    expected = taylor_importances(tiny("llama"), batches, Taylor(taylor), progress=False)
    assert found.kind == LLMPruner(taylor=taylor).kind == taylor
    for key, members in expected.members.items():
        assert all(torch.equal(found.members[key][role], vector) for role, vector in members.items())


def test_a_variant_that_is_not_there():
    expected = "^taylor must be vectorize, param_first, param_second or param_mix, not 'third'$"
    with pytest.raises(UserError, match=expected):
        taylor_importances(tiny("llama"), [{"input_ids": ids(2, 12)}], "third", progress=False)
    with pytest.raises(UserError, match=expected):
        LLMPruner(taylor="third")
    with pytest.raises(UserError, match=r"^reduction must be sum, mean, max or prod, not 'least'$"):
        LLMPruner(reduction="least")
