import pytest
import torch

from pp_lightning import UserError, prune_
from pp_lightning.blocks import Block
from pp_lightning.calibration_data import fingerprint
from pp_lightning.families import shape_of
from pp_lightning.functional.members import normalised_unit_scores
from pp_lightning.methods import LoRAPrune
from pp_lightning.methods.recorded import Choices, Recorded
from pp_lightning.plan import Amounts, make_plan
from pp_lightning.pruning import blocks_to_prune
from pp_lightning.recovery import Adapters, GradualPruning
from pp_lightning.recovery.gradual import check_schedule
from pp_lightning.recovery.importances import adapter_members
from tests.models import GROUPS, HEADS, MLP_WIDTH, MODELS, PRUNED, SETTINGS, ids, logits, tiny

STEPS = 10
METHOD = LoRAPrune(every=2, warmup=0.1, cooldown=0.2)


def start(name, method=METHOD, steps=STEPS):
    model = tiny(name)
    blocks = blocks_to_prune(model, make_plan(shape_of(model.config), method, Amounts(**SETTINGS)))
    adapters = Adapters(model, rank=4, alpha=8)
    return model, adapters, GradualPruning(adapters, blocks, method, steps)


def train(model, adapters, gradual, steps=range(1, STEPS + 1), rate=0.05):
    """Plain gradient descent on the adapters."""
    for step in steps:
        model(input_ids=ids(seed=step), labels=ids(seed=step), use_cache=False).loss.backward()
        gradual.after_gradients(step)
        with torch.no_grad():
            for parameter in adapters.parameters():
                parameter -= rate * parameter.grad
                parameter.grad = None


@pytest.mark.parametrize("name", MODELS)
def test_masks_close_by_the_schedule_and_stay_closed(name):
    model, adapters, gradual = start(name)
    units, keep = (GROUPS, 2) if MODELS[name].grouped else (HEADS, 3)
    before, counts = None, []
    for step in range(1, STEPS + 1):
        train(model, adapters, gradual, [step])
        if before is not None:
            assert all(bool((mask <= before[key]).all()) for key, mask in gradual.masks.items())
        before = {key: mask.clone() for key, mask in gradual.masks.items()}
        counts.append(int(gradual.masks[3, Block.MLP].sum()))
    ratio = 0.67
    path = [MLP_WIDTH - int(MLP_WIDTH * ratio * (1 - (1 - (s - 1) / 7) ** 3)) for s in (2, 4, 6)]
    assert counts == [160, path[0], path[0], path[1], path[1], max(64, path[2]), max(64, path[2]), 64, 64, 64]
    for layer in PRUNED:
        assert int(gradual.masks[layer, Block.ATTENTION].sum()) == keep
        assert len(gradual.masks[layer, Block.ATTENTION]) == units


@pytest.mark.parametrize("name", MODELS)
def test_masked_is_pruned(name):
    """What the masks leave equals the sliced model with the sliced adapters merged."""
    model, adapters, gradual = start(name)
    train(model, adapters, gradual)
    text = ids(2, 20, seed=77)
    masked = logits(model, text)
    units = GROUPS if MODELS[name].grouped else HEADS
    kept = gradual.choices()
    numbers = {Block.ATTENTION: units, Block.MLP: MLP_WIDTH}
    state = adapters.sliced_state({key: (choice.kept, numbers[key[1]]) for key, choice in kept.items()})
    gradual.detach()
    assert not torch.allclose(logits(model, text), masked, atol=1e-3)  # the masks did something
    adapters.detach()
    assert torch.equal(logits(model, text), logits(tiny(name), text))
    prune_(model, Recorded(["attention", "mlp"]), Choices(fingerprint(model), kept), **SETTINGS)
    inside = Adapters(model, rank=4, alpha=8)
    inside.load(state)
    inside.merge()
    torch.testing.assert_close(logits(model, text), masked, rtol=1e-4, atol=1e-4)


def test_averages_are_moving():
    model, adapters, gradual = start("llama", LoRAPrune(every=100, warmup=0.0, cooldown=0.5, momentum=0.8), steps=100)
    expected = torch.zeros(MLP_WIDTH)
    for step in (1, 2, 3):
        model(input_ids=ids(seed=step), labels=ids(seed=step), use_cache=False).loss.backward()
        members = adapter_members(adapters, [4])[4, Block.MLP]
        expected = 0.8 * expected + 0.2 * normalised_unit_scores(list(members.values()), MLP_WIDTH)
        gradual.after_gradients(step)
        for parameter in adapters.parameters():
            parameter.grad = None
    torch.testing.assert_close(gradual.averages[4, Block.MLP], expected)


def test_the_least_important_go_first():
    model, adapters, gradual = start("llama")
    train(model, adapters, gradual, [1, 2])
    average, mask = gradual.averages[3, Block.MLP], gradual.masks[3, Block.MLP]
    assert float(average[mask == 0].max()) <= float(average[mask == 1].min())
    assert 0 < int((mask == 0).sum()) < MLP_WIDTH


def test_state_goes_on_where_it_was():
    model, adapters, gradual = start("llama")
    train(model, adapters, gradual)
    again, others, other = start("llama")
    train(again, others, other, range(1, 6))
    saved = {name: tensor.clone() for name, tensor in other.state().items()}
    weights = {name: tensor.clone() for name, tensor in others.state().items()}
    third, fresh, last = start("llama")
    fresh.load(weights)
    last.load(saved)
    train(third, fresh, last, range(6, STEPS + 1))
    assert all(torch.equal(mask, gradual.masks[key]) for key, mask in last.masks.items())
    assert torch.equal(logits(third, ids()), logits(model, ids()))


def test_all_zero_scores_are_an_error():
    model, adapters, gradual = start("llama")
    model(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
    for parameter in adapters.parameters():
        parameter.grad.zero_()
    with pytest.raises(UserError, match="all zero, any choice would be arbitrary"):
        gradual.after_gradients(1)
    assert all(bool(mask.all()) for mask in gradual.masks.values())


def test_a_schedule_that_ends_before_its_ratio():
    check_schedule(LoRAPrune(), 300)
    check_schedule(LoRAPrune(), 300 + 9)  # the last removal is inside the cool-down
    with pytest.raises(UserError, match="reaches 0% of its ratio in 5 steps: train longer"):
        check_schedule(LoRAPrune(), 5)
    with pytest.raises(UserError, match=r"reaches 9\d% of its ratio in 99 steps"):
        check_schedule(LoRAPrune(every=30, cooldown=0.0), 99)
    with pytest.raises(UserError, match="reaches 0%"):
        start("llama", LoRAPrune(every=20), steps=10)
