"""How much the loss rises with one block pruned alone: against whole runs with changed weights, and what it decides."""

import copy

import pytest
import torch

from pp_lightning import LeastSquares, calibrate, prune_, unprune_
from pp_lightning.blocks import Block
from pp_lightning.errors import UserError
from pp_lightning.families import blocks_of, layers_of
from pp_lightning.layerwise import LayerByLayer
from pp_lightning.methods import StaticBest
from pp_lightning.pruning import is_pruned, pruning_of
from pp_lightning.sensitivity import PrunedAlone, loss_rises, scaled, some_rows
from tests.models import calibration_batches, ids, logits, padded, tiny

ASKED = {"pruning_ratio": 0.4, "skip_layers": (0, 1), "round_to": 16}


def alone(model):
    """Every block with half of its channels, whose columns are other ones."""
    generator, found = torch.Generator().manual_seed(0), {}
    for key, modules in blocks_of(model).items():
        weight = modules.output_weight
        kept = torch.randperm(weight.shape[1], generator=generator)[: weight.shape[1] // 2]
        columns = weight[:, kept] + 0.3 * torch.randn(len(weight), len(kept), generator=generator).to(weight)
        found[key] = PrunedAlone(modules, kept, lambda columns=columns: columns)
    return found


@torch.no_grad()
def naive(model, batches, blocks):
    """The loss of whole runs of a copy in which one block's matrix is another one."""

    def loss(one):
        total = tokens = 0
        for batch in batches:
            labels = batch["input_ids"].masked_fill(batch.get("attention_mask", torch.ones(1)) == 0, -100)
            number = int((labels[:, 1:] >= 0).sum())
            total, tokens = total + one(**batch, labels=labels, use_cache=False).loss * number, tokens + number
        return float(total / tokens)

    rises = {}
    for key, block in blocks.items():
        changed = copy.deepcopy(model)
        weight = blocks_of(changed)[key].output_weight
        weight.zero_()
        weight[:, block.kept] = block.columns()
        rises[key] = loss(changed) - loss(model)
    return rises


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("name", ["llama_gqa", "opt", "gemma3_text"])
@torch.no_grad()
def test_rises_are_those_of_whole_runs(tmp_path, name, on_disk):
    model, batches = tiny(name).double(), [padded(ids(), left=3), {"input_ids": ids(2, 17, seed=3)}]
    blocks, before = alone(model), {name: weight.clone() for name, weight in model.named_parameters()}
    lines = []
    rises = loss_rises(model, batches, blocks, tmp_path if on_disk else None, "these", lines.append)
    # stock models take their loss in float32 whatever their dtype: 5e-7 of about 5
    assert rises == pytest.approx(naive(model, batches, blocks), rel=0, abs=2e-6)
    assert list(rises) == list(blocks) and max(map(abs, rises.values())) > 1e-2
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name])
    assert any("minutes left" in line for line in lines)


def test_an_interrupted_run_goes_on_at_its_layer_and_a_finished_one_is_read(tmp_path):
    model, batches = tiny("llama"), calibration_batches()
    blocks, runs = alone(model), []
    whole = loss_rises(model, batches, blocks, None, "these", lambda line: None)

    def dies(line):
        if "run 8 of" in line:  # behind the second layer
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loss_rises(model, batches, blocks, tmp_path, "these", dies)
    mlps = [modules.module for (_, block), modules in blocks_of(model).items() if block is Block.MLP]
    for mlp in mlps:
        mlp.register_forward_hook(lambda mlp, *_: runs.append(mlp))
    assert loss_rises(model, batches, blocks, tmp_path, "these", lambda line: None) == whole
    # the first layer's run shows what layers give; all batches, and the copies that are under way
    assert [runs.count(mlp) for mlp in mlps] == [1, 0, *(len(batches) * copies for copies in (7, 9, 11))]
    runs.clear()
    assert loss_rises(model, batches, blocks, tmp_path, "these", lambda line: None) == whole and not runs
    assert loss_rises(model, batches[:1], blocks, tmp_path, "others", lambda line: None) != whole


@torch.no_grad()
def test_copies_go_on_beside_the_batches():
    model, batches = tiny("llama"), calibration_batches()
    layer, carried = layers_of(model)[1], LayerByLayer(model, batches)
    carried.advance()
    hook = layer.register_forward_hook(lambda _, __, out: (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2)
    carried.fork()
    hook.remove()
    carried.advance()
    for number in range(len(batches)):
        assert torch.equal(carried.hidden(len(batches) + number), 2 * carried.hidden(number))
    dense = [carried.hidden(number) for number in range(len(batches))]
    carried.advance()
    other = LayerByLayer(model, batches)
    for _ in range(2):
        other.advance()
    assert all(torch.equal(one, other.hidden(number)) for number, one in enumerate(dense))


UNSEEN = (2, Block.MLP)


def planted():
    """A model whose third MLP writes, loudly, where nobody reads."""
    model = tiny("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, :16] = 1.0  # so that norms hardly see it either
        for name, module in model.named_modules():
            if name.endswith("norm"):
                module.weight[:16] = 0.0
        for key, modules in blocks_of(model).items():
            weight = modules.output_weight
            weight[:16] *= 3.0 if key == UNSEEN else 0.0
            weight[16:] *= 0.0 if key == UNSEEN else 1.0
    return model


def test_a_block_that_the_loss_does_not_see_counts_for_less():
    model, batches = planted(), calibration_batches(4)
    stats, keep = calibrate(model, batches, progress=False), {}
    for tokens in (0, 512):
        prune_(model, StaticBest(), stats, **ASKED, update=LeastSquares(batches, loss_tokens=tokens))
        keep[tokens] = dict(pruning_of(model).keep)
        unprune_(model)
    mlps = [key for key in keep[0] if key[1] is Block.MLP]
    assert keep[512][UNSEEN] < keep[0][UNSEEN]
    assert keep[0][UNSEEN] == max(keep[0][key] for key in mlps)


def test_the_loss_is_read_on_held_out_rows_and_nothing_is_left_behind():
    """Other rows of the batch that is held out, other counts; the same rows, the same, whatever else is held out."""
    model, text = planted(), ids()
    batches = [{"input_ids": ids(4, 16, seed=seed)} for seed in range(4)]
    stats, dense = calibrate(model, batches, progress=False), logits(model, text)
    found = []
    for last, tokens in ((3, 32), (3, 32), (9, 32)):
        given = [*batches[:3], {"input_ids": torch.cat([batches[3]["input_ids"][:2], ids(2, 16, seed=last)])}]
        update = LeastSquares(given, loss_tokens=tokens)
        prune_(model, StaticBest(), stats, **ASKED, update=update)
        found.append(dict(pruning_of(model).keep))
        unprune_(model)
        assert torch.equal(logits(model, text), dense)
    assert found[0] == found[1] == found[2]
    rows = some_rows(batches[2:], 32)
    assert [len(batch["input_ids"]) for batch in rows] == [1, 1] and len(some_rows(batches[2:], 16)) == 1
    assert [len(batch["input_ids"]) for batch in some_rows(batches, 10**6)] == [4] * 4


def test_losses_are_half_what_was_measured_and_half_the_median():
    keys = [(layer, Block.MLP) for layer in range(5)]
    losses = {key: torch.tensor([5.0, 3.0, 2.0, 1.0]) * 10**layer for layer, key in enumerate(keys)}
    losses[keys[4]] = torch.zeros(4)  # nothing to lose: its rise says nothing
    rises = dict(zip(keys, [0.3, -0.3, 150.0, 900.0, 0.5], strict=True))
    found = scaled(losses, dict.fromkeys(keys, 2), rises)
    ratios = [0.1, 0.0, 0.5, 0.3]  # of what was measured to the 3, 30, 300, 3000 that were predicted; the median is 0.2
    for key, ratio in zip(keys, ratios, strict=False):
        torch.testing.assert_close(found[key], losses[key] * (ratio + 0.2) / 2)
    assert torch.equal(found[keys[4]], losses[keys[4]])
    unseen = scaled({keys[0]: losses[keys[0]]}, {keys[0]: 2}, {keys[0]: -1.0})
    assert (unseen[keys[0]] > 0).all(), "units still rank by what they lose"


def test_mistakes_are_one_line_and_leave_the_model_dense():
    model, batches = tiny("llama"), calibration_batches()
    stats, text = calibrate(model, batches, progress=False), ids()
    dense = logits(model, text)
    with pytest.raises(UserError, match="loss_tokens must not be negative, not -1"):
        prune_(model, StaticBest(), stats, **ASKED, update=LeastSquares(batches, loss_tokens=-1))
    with pytest.raises(UserError, match="one token predict nothing"):
        loss_rises(model, [{"input_ids": ids(2, 1)}], alone(model), None, "", lambda line: None)
    assert not is_pruned(model) and torch.equal(logits(model, text), dense)
    with torch.no_grad():
        model.lm_head.weight[:] = float("nan")
    stats = calibrate(model, batches, progress=False)
    with pytest.raises(UserError, match="are not finite"):
        prune_(model, StaticBest(), stats, **ASKED, update=LeastSquares(batches))
    assert not is_pruned(model)
