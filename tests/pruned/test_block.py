"""What a block keeps, allocates and lays out."""

import pytest
import torch

from pp_lightning import calibrate, kept_units, prune_, unprune_
from pp_lightning.functional import linear as linear_module
from pp_lightning.methods import FullBatchProbing, ProbePruning
from pp_lightning.pruned.choice import Choice
from pp_lightning.pruned.slices import SliceMemory
from pp_lightning.pruning import pruning_of
from tests.models import (
    MODELS,
    PRUNED,
    SETTINGS,
    calibration_batches,
    choices,
    ids,
    logits,
    masked_dense,
    output_weights,
    pruned_blocks,
    statistics,
    tiny,
)


def pruned(name="llama", method=ProbePruning, **settings):
    model = tiny(name)
    prune_(model, method(), statistics(name), **{**SETTINGS, **settings})
    return model


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
def test_one_slice_at_a_time_in_one_buffer(name, unit):
    model = pruned(name, lambda: ProbePruning(attention_unit=unit))
    logits(model, ids())
    memory = pruning_of(model).context.memory
    address, size = memory.buffer.data_ptr(), memory.buffer.numel()
    logits(model, ids(seed=2))
    assert (memory.buffer.data_ptr(), memory.buffer.numel()) == (address, size)
    largest = max(sum(tensor.numel() for tensor in slice_of(block)) for block in blocks_of(model))
    assert largest <= size < 1.1 * largest
    # nothing is held between batches but that
    assert all(block.runner.slices.held is None for block in blocks_of(model))


def slice_of(block):
    """The tensors of a block's slice, in memory of their own."""
    found = block.runner.slices.of(block.last)  # gradients are on: fresh memory
    return [tensor for matrix in found.values() for tensor in matrix if tensor is not None]


@torch.no_grad()
def test_slices_in_one_buffer_do_not_overlap():
    """The output has its columns in memory; a bias lies behind its weight."""
    model = pruned("opt")
    logits(model, ids())
    for block in blocks_of(model):
        shared = block.runner.slices.of(block.last)
        with torch.enable_grad():
            fresh = block.runner.slices.of(block.last)
        for name, matrix in fresh.items():
            assert torch.equal(shared[name].weight, matrix.weight)
            assert torch.equal(shared[name].bias, matrix.bias)
        other = block.runner.slices.of(Choice((block.kept + 1) % block.units.number))
        assert other[block.runner.output.name].weight.data_ptr() == shared[block.runner.output.name].weight.data_ptr()


@torch.no_grad()
def test_memory_follows_the_weights_type_and_the_largest_slice():
    memory, like = SliceMemory(), torch.zeros(4, 4)
    memory.reserve(6)
    memory.prepare(like)
    assert (memory.buffer.dtype, memory.buffer.numel()) == (torch.float32, 6)
    memory.prepare(like.half())
    assert memory.buffer.dtype == torch.float16
    memory.reserve(12)
    memory.prepare(like.half())
    assert memory.buffer.numel() == 12


def test_an_accelerator_keeps_freed_memory_at_hand_itself():
    memory = SliceMemory()
    memory.reserve(10)
    memory.prepare(torch.zeros(4, 4, device="meta"))
    assert memory.buffer is None


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


def test_a_held_slice_is_let_go_by_the_next_prompt():
    model = pruned()
    with torch.no_grad():
        cache = model(input_ids=ids(), use_cache=True).past_key_values
        model(input_ids=ids(4, 1), past_key_values=cache, use_cache=True)
        assert all(block.runner.slices.held is not None for block in blocks_of(model))
        model(input_ids=ids(seed=2), use_cache=False)
    assert all(block.runner.slices.held is None for block in blocks_of(model))


def held_at(block):
    return [matrix.weight.data_ptr() for matrix in block.runner.slices.hold(block.last).values()]


@torch.no_grad()
def decoded(model, prompt, token):
    cache = model(input_ids=prompt, use_cache=True).past_key_values
    return model(input_ids=token, past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", ["llama_gqa", "opt"])
def test_once_a_model_decodes_its_prompts_leave_the_slices_for_it(name, rows):
    """A prompt of one row would share one projection with its probe; and a batch that nothing continues leaves none."""
    model, fresh = (pruned(name) for _ in range(2))
    first, second, token = ids(rows), ids(rows, seed=2), ids(rows, 1, seed=3)
    with torch.no_grad():
        model(input_ids=first, use_cache=True)
    assert all(block.runner.slices.held is None for block in blocks_of(model)), (
        "nobody knows yet that this model decodes"
    )
    logits(fresh, first)  # moves its history as well
    decoded(model, first, token)
    memory = [held_at(block) for block in blocks_of(model)]
    logits(model, first)
    logits(fresh, first)
    assert all(block.runner.slices.held is None for block in blocks_of(model))
    logits(fresh, first)
    with torch.no_grad():
        cache = model(input_ids=second, use_cache=True).past_key_values
    left = [block.runner.slices.held for block in blocks_of(model)]
    assert all(held is not None for held in left)
    with torch.no_grad():
        found = model(input_ids=token, past_key_values=cache, use_cache=True).logits
    assert all(block.runner.slices.held is one for block, one in zip(blocks_of(model), left, strict=True))
    assert [held_at(block) for block in blocks_of(model)] == memory
    expected = decoded(fresh, second, token)
    assert choices(kept_units(model)) == choices(kept_units(fresh))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_where_products_want_rows_slices_are_held_by_rows(monkeypatch):
    model, plain = (pruned() for _ in range(2))
    expected = [decoded(plain, ids(seed=seed), ids(4, 1)) for seed in (1, 2)]
    assert not any(
        block.runner.slices.held[block.runner.output.name].weight.is_contiguous() for block in blocks_of(plain)
    )
    monkeypatch.setattr(linear_module, "_NATIVE", {torch.float32: False})  # as half precision on many a laptop
    found = [decoded(model, ids(seed=seed), ids(4, 1)) for seed in (1, 2)]
    assert all(block.runner.slices.held[block.runner.output.name].weight.is_contiguous() for block in blocks_of(model))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_is_left_is_what_a_copy_would_be():
    model = pruned()
    decoded(model, ids(), ids(4, 1))
    model(input_ids=ids(seed=2), use_cache=True)
    for block in blocks_of(model):
        left = block.runner.slices.held
        with torch.enable_grad():  # in memory of its own
            copied = block.runner.slices.of(block.last)
            other = block.runner.slices.of(Choice((block.kept + 1) % block.units.number), output_alone=True)
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
