"""One attention and one MLP block alone: dense, static, and choosing, on the inputs that they meet inside the model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pp_lightning.architectures import architecture_of, shape_of
from pp_lightning.compilation import CompileMode, torch_mode, with_own_code
from pp_lightning.plan import make_plan
from pp_lightning.pruned.block import PrunedBlock
from pp_lightning.pruned.context import BatchContext
from pp_lightning.pruned.dynamic import layer_pruner
from pp_lightning.pruned.layer import LayerPruner
from pp_lightning.pruned.surroundings import Surroundings
from pp_lightning.pruning import pruners_of

BlockFunction = Callable[[int], object]


@dataclass(frozen=True)
class Meeting:
    """What a layer met in one batch: the residual in front of each block, and what surrounds it."""

    hidden: Tensor
    middle: Tensor
    around: Surroundings


def dense_pruner(model: PreTrainedModel, index: int) -> LayerPruner:
    """A pruner for a layer of a dynamically pruned model that keeps everything: its blocks run densely."""
    architecture, shape = architecture_of(model.config), shape_of(model.config)
    method = pruners_of(model)[index].attention.method
    plan = make_plan(shape, method, pruning_ratio=0.0, skip_layers=())
    layer = architecture.layers_of(model)[index]
    return layer_pruner(layer, index, architecture, shape, plan.blocks, method, BatchContext(None), None, release=False)


@torch.inference_mode()
def meetings(model: PreTrainedModel, index: int, batches: Sequence[Tensor]) -> list[Meeting]:
    """What layer ``index`` of a dynamically pruned, not compiled model meets in each batch."""
    seen: list[Meeting] = []
    pruner = pruners_of(model)[index]
    original = pruner.run_batch

    def watch(one: LayerPruner, hidden: Tensor, earlier: Any, around: Surroundings, *rest: Any) -> Any:
        result = original(one, hidden, earlier, around, *rest)
        seen.append(Meeting(hidden, result.middle, around.of_batch(hidden.shape[1])))
        return result

    pruner.run_batch = watch
    try:
        for batch in batches:
            model(input_ids=batch, use_cache=False)
    finally:
        pruner.run_batch = original
    return seen


def choosing_function(
    block: PrunedBlock, inputs: Sequence[tuple[Tensor, Surroundings]], *, compiled: CompileMode | None
) -> BlockFunction:
    """A block that chooses for every batch, or a whole one, as a function of the batch's number.

    Args:
        block: the block.
        inputs: what it meets in each batch.
        compiled: torch.compile's mode; None runs it eagerly.
    """
    run = _run_block if compiled is None else _compiled(_run_block, compiled)
    return lambda index: run(block, *inputs[index])


@torch.inference_mode()
def held_function(
    block: PrunedBlock, inputs: Sequence[tuple[Tensor, Surroundings]], *, compiled: CompileMode | None
) -> BlockFunction:
    """:func:`choosing_function` on a choice made once: what a static method of the same ratio costs."""
    _run_held(block, *inputs[0])  # makes the slices: not while a clock runs, and not inside the graph
    run = _run_held if compiled is None else _compiled(_run_held, compiled)
    return lambda index: run(block, *inputs[index])


def _run_block(block: PrunedBlock, residual: Tensor, around: Surroundings) -> Tensor:
    how = block.how_to_run(residual.shape[0], residual.shape[1], parallel=False)
    return residual + block(residual, residual, around, how)[0]


def _run_held(block: PrunedBlock, residual: Tensor, around: Surroundings) -> Tensor:
    return residual + block.decode(residual, replace(around, remember=False))


def _compiled(function: Callable[..., Any], mode: CompileMode) -> Callable[..., Any]:
    settings: dict[str, Any] = {"fullgraph": True, "dynamic": False, "mode": torch_mode(mode)}
    compiled: Callable[..., Any] = torch.compile(with_own_code(function), **settings)
    return compiled
