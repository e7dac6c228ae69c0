"""What a block keeps, allocates and lays out."""

import pytest
import torch
from pp_lightning.pruned.workspace import SliceWorkspace, fresh_memory

from pp_lightning import calibrate, kept_units, prune_, unprune_
from pp_lightning.functional import linear as linear_module
from pp_lightning.methods import FullBatchProbing, ProbePruning
from pp_lightning.pruned.choice import Choice
from pp_lightning.pruning import pruners_of, pruning_of
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
    statistics,
    tiny,
)


def pruned(name="llama", method=ProbePruning, **settings):
    model = tiny(name)
    prune_(model, method(), statistics(name), **{**SETTINGS, **settings})
    return model


def blocks_of(model):
    return [block for pruner in pruners_of(model).values() for block in (pruner.attention, pruner.mlp)]


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
    workspace = pruning_of(model).context.workspace
    address, size = workspace.buffer.data_ptr(), workspace.buffer.numel()
    assert size == max(block.slices.size for block in blocks_of(model))
    logits(model, ids(seed=2))
    assert (workspace.buffer.data_ptr(), workspace.buffer.numel()) == (address, size)
    # nothing is held between batches but that
    assert all(block.slices.held is None for block in blocks_of(model))


def workspace_of(size, like):
    workspace = SliceWorkspace()
    workspace.reserve(size)
    workspace.prepare(like)
    return workspace


@torch.no_grad()
def test_workspace_hands_out_one_buffer_in_turn():
    like = torch.zeros(4, 4)
    workspace = workspace_of(10, like)
    take = workspace.begin(like)
    first, second = take((2, 3), like), take((2, 2), like)
    first.fill_(1.0)
    second.fill_(2.0)
    assert first.eq(1).all() and second.eq(2).all()  # they do not overlap
    again = workspace.begin(like)((2, 3), like)
    assert again.data_ptr() == first.data_ptr()
    assert fresh_memory((2, 3), like) is None


@torch.no_grad()
def test_workspace_follows_the_weights_type_and_the_largest_slice():
    like = torch.zeros(4, 4)
    workspace = workspace_of(6, like)
    assert workspace.begin(like.half()) is fresh_memory  # not prepared for these
    workspace.prepare(like.half())
    assert workspace.begin(like.half())((2, 3), like.half()).dtype == torch.float16
    workspace.reserve(12)
    assert workspace.begin(like.half()) is fresh_memory
    workspace.prepare(like.half())
    assert workspace.buffer.numel() == 12


@torch.no_grad()
def test_an_accelerator_keeps_freed_memory_at_hand_itself():
    like = torch.zeros(4, 4, device="meta")
    assert workspace_of(10, like).buffer is None
    outliving = SliceWorkspace(outlives_batch=True)
    outliving.reserve(10)
    outliving.prepare(like)
    assert outliving.buffer.device == like.device


def test_gradients_are_recorded_with_memory_of_their_own():
    like = torch.zeros(4, 4)
    assert workspace_of(10, like).buffer is None
    with torch.no_grad():
        workspace = workspace_of(10, like)
        assert workspace.begin(like) is not fresh_memory
    assert workspace.begin(like) is fresh_memory


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
        assert all(block.slices.held is not None for block in blocks_of(model))
        model(input_ids=ids(seed=2), use_cache=False)
    assert all(block.slices.held is None for block in blocks_of(model))


@torch.no_grad()
def decoded(model, prompt, token):
    cache = model(input_ids=prompt, use_cache=True).past_key_values
    return model(input_ids=token, past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", ["llama_gqa", "opt"])
def test_once_a_model_decodes_its_prompts_leave_the_slices_for_it(name, rows, packs):
    """A prompt of one row would share one projection with its probe; and a batch that nothing continues leaves none."""
    model, fresh = (pruned(name, pack_slices=packs) for _ in range(2))
    first, second, token = ids(rows), ids(rows, seed=2), ids(rows, 1, seed=3)
    with torch.no_grad():
        model(input_ids=first, use_cache=True)
    assert all(block.slices.held is None for block in blocks_of(model)), "nobody knows yet that this model decodes"
    logits(fresh, first)  # moves its history as well
    decoded(model, first, token)
    memory = [None if packs else block.slices._own.buffer.data_ptr() for block in blocks_of(model)]
    logits(model, first)
    logits(fresh, first)
    assert all(block.slices.held is None for block in blocks_of(model))
    logits(fresh, first)
    with torch.no_grad():
        cache = model(input_ids=second, use_cache=True).past_key_values
    left = [block.slices.held for block in blocks_of(model)]
    assert all(held is not None for held in left)
    with torch.no_grad():
        found = model(input_ids=token, past_key_values=cache, use_cache=True).logits
    assert [block.slices.held for block in blocks_of(model)] == left
    assert [None if packs else block.slices._own.buffer.data_ptr() for block in blocks_of(model)] == memory
    expected = decoded(fresh, second, token)
    assert choices(kept_units(model)) == choices(kept_units(fresh))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packs", [False, True])
def test_where_products_want_rows_slices_are_held_by_rows(monkeypatch, packs):
    model, plain = (pruned(pack_slices=packs) for _ in range(2))
    expected = [decoded(plain, ids(seed=seed), ids(4, 1)) for seed in (1, 2)]
    assert not any(block.slices.held.projections["output"].weight.is_contiguous() for block in blocks_of(plain))
    monkeypatch.setattr(linear_module, "_NATIVE", {torch.float32: False})  # as half precision on many a laptop
    found = [decoded(model, ids(seed=seed), ids(4, 1)) for seed in (1, 2)]
    assert all(block.slices.held.projections["output"].weight.is_contiguous() for block in blocks_of(model))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_packed_slices_are_held_as_they_are():
    model = pruned(pack_slices=True)
    decoded(model, ids(), ids(4, 1))
    for block in blocks_of(model):
        assert block.slices._own is None, "no second copy"
        assert (
            block.slices.held.projections["output"].weight.data_ptr() == block.slices.packed.rows["output"].data_ptr()
        )


def test_packed_slices_of_an_earlier_batch_do_not_hide_gradients():
    model, plain, text = pruned(pack_slices=True), pruned(), ids()
    for one in (model, plain):
        logits(one, ids(seed=2))
        first = one(input_ids=text, labels=text, use_cache=True)
        first.loss.backward()
        with torch.no_grad():
            one.continued = one(input_ids=ids(4, 1), past_key_values=first.past_key_values, use_cache=True).logits
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(model.continued, plain.continued, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_is_left_is_what_a_copy_would_be():
    model = pruned()
    decoded(model, ids(), ids(4, 1))
    model(input_ids=ids(seed=2), use_cache=True)
    for block in blocks_of(model):
        left = block.slices.held
        copied = block.slices.of(Choice(block.kept), fresh_memory)
        for role, projection in copied.projections.items():
            assert torch.equal(left.projections[role].weight, projection.weight), role
        other = block.slices.of(Choice((block.kept + 1) % block.units.number), fresh_memory, ["output"])
        assert not torch.equal(left.projections["output"].weight, other.projections["output"].weight)


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
