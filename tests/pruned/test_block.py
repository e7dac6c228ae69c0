"""What a block keeps, allocates and lays out."""

import pytest
import torch

from pp_lightning import calibrate, kept_units, prune_, unprune_
from pp_lightning.functional import linear as linear_module
from pp_lightning.methods import FullBatchProbing, ProbePruning
from pp_lightning.pruned.choice import Choice
from pp_lightning.pruned.slices import BlockSlices, SliceMemory
from pp_lightning.pruning import last_choices, pruning_of
from tests.models import (
    MODELS,
    PRUNED,
    SETTINGS,
    calibration_batches,
    choices,
    held_by,
    ids,
    logits,
    masked_dense,
    output_weights,
    pruned,
    pruned_blocks,
    tiny,
)


def blocks_of(model):
    return list(pruned_blocks(model).values())


@pytest.mark.parametrize("name", MODELS)
def test_output_matrices_are_laid_out_by_columns_while_pruned(name):
    model = pruned(name)
    for layer in range(5):
        for weight in output_weights(model, layer):
            assert weight.t().is_contiguous() == (layer in PRUNED)
    unprune_(model)
    assert all(weight.is_contiguous() for layer in range(5) for weight in output_weights(model, layer))


def test_a_dense_block_is_not_laid_out():
    model = pruned(method=lambda: ProbePruning(blocks=("mlp",)))
    attention, mlp = output_weights(model, 3)
    assert attention.is_contiguous()
    assert mlp.t().is_contiguous()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("unit", [None, "query_head"])
def test_one_slice_at_a_time_in_one_buffer(name, unit, monkeypatch):
    model, buffers = pruned(name, lambda: ProbePruning(attention_unit=unit)), []
    real = BlockSlices.of
    monkeypatch.setattr(
        BlockSlices,
        "of",
        lambda one, choice, buffer=None, **k: buffers.append(buffer) or real(one, choice, buffer, **k),
    )
    logits(model, ids())
    logits(model, ids(seed=2))
    assert len({buffer.data_ptr() for buffer in buffers}) == 1
    monkeypatch.undo()
    choice = last_choices(model)
    largest = max(sum(t.numel() for t in slice_of(block, choice[block.key])) for block in blocks_of(model))
    assert largest <= buffers[0].numel() < 1.1 * largest
    assert pruning_of(model).context.held.nbytes == 0  # nothing is held between batches


def slice_of(block, choice):
    """The tensors of a block's slice, in memory of their own."""
    return [tensor for matrix in block.runner.slices.of(choice).values() for tensor in matrix if tensor is not None]


@torch.no_grad()
def test_slices_in_one_buffer_do_not_overlap():
    """The output has its columns in memory; a bias lies behind its weight."""
    model = pruned("opt")
    logits(model, ids())
    for block in blocks_of(model):
        slices, kept = block.runner.slices, last_choices(model)[block.key].kept
        buffer = torch.empty(slices.size)
        shared, fresh = slices.of(Choice(kept), buffer), slices.of(Choice(kept))
        for name, matrix in fresh.items():
            assert torch.equal(shared[name].weight, matrix.weight)
            assert torch.equal(shared[name].bias, matrix.bias)
        other = slices.of(Choice((kept + 1) % block.units.number), buffer)
        assert other[block.runner.output.name].weight.data_ptr() == shared[block.runner.output.name].weight.data_ptr()


@torch.no_grad()
def test_memory_follows_the_weights_type_and_the_largest_slice():
    memory, like = SliceMemory(), torch.zeros(4, 4)
    memory.reserve(6)
    first = memory.take(like)
    assert (first.dtype, first.numel()) == (torch.float32, 6)
    assert memory.take(like).data_ptr() != first.data_ptr()  # another batch runs at the same time
    memory.give_back(first)
    assert memory.take(like).data_ptr() == first.data_ptr()
    memory.give_back(first)
    assert memory.take(like.half()).dtype == torch.float16
    memory.give_back(first)
    memory.reserve(12)
    assert memory.take(like).numel() == 12


def test_an_accelerator_keeps_freed_memory_at_hand_itself():
    memory = SliceMemory()
    memory.reserve(10)
    with torch.no_grad():
        assert memory.take(torch.zeros(4, 4, device="meta")) is None


@pytest.mark.parametrize("name", ["llama", "llama_gqa", "opt"])
def test_gradients_are_those_of_the_masked_dense_model(name):
    model, text = pruned(name, FullBatchProbing), ids()
    model(input_ids=text, labels=text, use_cache=False).loss.backward()
    masked = masked_dense(tiny(name), kept_units(model), 4 if MODELS[name].grouped else 8)
    masked(input_ids=text, labels=text, use_cache=False).loss.backward()
    outputs = tuple(f"{module}.weight" for module in ("o_proj", "down_proj", "out_proj", "fc2"))
    for (path, found), expected in zip(model.named_parameters(), masked.parameters(), strict=True):
        gradient = expected.grad
        if path.endswith(outputs):  # a dropped column has no part in the pruned model
            gradient = gradient * (expected != 0)
        torch.testing.assert_close(found.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_inference_mode_and_back(name):
    model, plain = pruned(name), pruned(name)
    with torch.inference_mode():
        first = model(input_ids=ids(), use_cache=False).logits
    second = logits(model, ids(seed=2))
    with torch.inference_mode():
        third = model(input_ids=ids(seed=3), use_cache=False).logits
    assert torch.equal(first, logits(plain, ids()))
    assert torch.equal(second, logits(plain, ids(seed=2)))
    assert torch.equal(third, logits(plain, ids(seed=3)))


def test_scores_constant_is_computed_once():
    model = pruned()
    before = [block.weight_norm.data_ptr() for block in blocks_of(model)]
    logits(model, ids())
    assert [block.weight_norm.data_ptr() for block in blocks_of(model)] == before


@torch.no_grad()
def decoded(model, prompt, token):
    cache = model(input_ids=prompt, use_cache=True).past_key_values
    return model(input_ids=token, past_key_values=cache, use_cache=True).logits, cache


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", ["llama_gqa", "opt"])
def test_once_a_model_decodes_its_prompts_leave_the_slices_for_it(name, rows):
    """A prompt of one row would share one projection with its probe; and a batch that nothing continues leaves none."""
    model, fresh = (pruned(name) for _ in range(2))
    first, second, token = ids(rows), ids(rows, seed=2), ids(rows, 1, seed=3)
    with torch.no_grad():
        cache = model(input_ids=first, use_cache=True).past_key_values
    assert held_by(cache) is None, "nobody knows yet that this model decodes"
    logits(fresh, first)  # moves its history as well
    _, cache = decoded(model, first, token)
    memory = addresses(cache)
    del cache
    logits(model, first)
    logits(fresh, first)
    logits(fresh, first)
    with torch.no_grad():
        cache = model(input_ids=second, use_cache=True).past_key_values
    left = list(held_by(cache))
    assert None not in left
    with torch.no_grad():
        found = model(input_ids=token, past_key_values=cache, use_cache=True).logits
    assert all(now is before for now, before in zip(held_by(cache), left, strict=True))
    assert addresses(cache) == memory  # that of the conversation that is gone
    expected, _ = decoded(fresh, second, token)
    assert choices(kept_units(model)) == choices(kept_units(fresh))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def addresses(cache):
    return [matrix.weight.data_ptr() for one in held_by(cache) for matrix in one.values()]


def outputs_by_rows(model, cache):
    blocks = zip(blocks_of(model), held_by(cache), strict=True)
    return [held[block.runner.output.name].weight.is_contiguous() for block, held in blocks]


def test_where_products_want_rows_slices_are_held_by_rows(monkeypatch):
    model, plain = (pruned() for _ in range(2))
    expected = [decoded(plain, ids(seed=seed), ids(4, 1)) for seed in (1, 2)]
    assert not any(outputs_by_rows(plain, expected[-1][1]))
    monkeypatch.setattr(linear_module, "is_emulated", lambda *_: True)  # as half precision on many a laptop
    found = [decoded(model, ids(seed=seed), ids(4, 1)) for seed in (1, 2)]
    assert all(outputs_by_rows(model, found[-1][1]))
    for (one, _), (other, _) in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_is_left_is_what_a_copy_would_be():
    model = pruned()
    decoded(model, ids(), ids(4, 1))
    cache = model(input_ids=ids(seed=2), use_cache=True).past_key_values
    for block, left, choice in zip(blocks_of(model), held_by(cache), cache.pruning_choice.choices, strict=True):
        copied = block.runner.slices.of(choice)
        other = block.runner.slices.of(Choice((choice.kept + 1) % block.units.number), output_alone=True)
        for name, matrix in copied.items():
            assert torch.equal(left[name].weight, matrix.weight), name
        output = block.runner.output.name
        assert not torch.equal(left[output].weight, other[output].weight)


@pytest.mark.parametrize("name", MODELS)
def test_double_precision(name):
    """No precision that a model may have is refused; statistics stay float32."""
    model = tiny(name).double()
    stats = calibrate(model, calibration_batches(), progress=False)
    prune_(model, ProbePruning(), stats, **SETTINGS)
    found, single = logits(model, ids()), pruned(name)
    torch.testing.assert_close(found.float(), logits(single, ids()), rtol=1e-4, atol=1e-4)
    assert choices(kept_units(model)) == choices(kept_units(single))
    assert all(block.history.dtype == torch.float32 for block in blocks_of(model))
