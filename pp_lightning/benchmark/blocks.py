"""One attention and one MLP block alone: dense, static, and choosing, on the inputs that they meet inside the model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pp_lightning.blocks import BlockKey
from pp_lightning.compilation import CompileMode, torch_mode, with_own_code
from pp_lightning.families import BlockModules, blocks_of
from pp_lightning.interfaces import argument_names
from pp_lightning.pruned.block import PrunedBlock
from pp_lightning.pruned.inputs import BatchInputs
from pp_lightning.pruning import is_pruned, pruning_of

BlockFunction = Callable[[int], object]


@dataclass
class Meeting:
    """What a block meets in one batch.

    Attributes:
        residual: what entered the norm in front; ``hidden`` where none is in front.
        inputs: the batch, as pruned blocks see it.
    """

    hidden: Tensor
    given: Mapping[str, Any]
    residual: Tensor
    inputs: BatchInputs


@torch.inference_mode()
def meetings(model: PreTrainedModel, key: BlockKey, batches: Sequence[Tensor]) -> list[Meeting]:
    """What one pruned block of a dynamically pruned, not compiled model meets in each batch."""
    context, block = pruning_of(model).context, pruning_of(model).pruners[key]
    assert context is not None
    modules, seen, residuals = blocks_of(model)[key], list[Meeting](), list[Tensor]()
    entrance = modules.projection(next(iter(modules.inputs))) if modules.is_bare else modules.module
    names = argument_names(entrance)

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        hidden = given.pop(names[0])
        assert context is not None and context.batch is not None
        seen.append(Meeting(hidden, given, residuals[-1] if residuals else hidden, context.batch))

    hooks = [entrance.register_forward_pre_hook(note, with_kwargs=True)]
    if block.norm is not None:
        hooks.append(block.norm.register_forward_pre_hook(lambda _, args: residuals.append(args[0])))
    try:
        for batch in batches:
            model(input_ids=batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def block_function(
    model: PreTrainedModel, key: BlockKey, met: Sequence[Meeting], *, compiled: CompileMode | None
) -> BlockFunction:
    """A block of a model, dense or pruned by any method, as a function of the batch's number."""
    pruner = pruning_of(model).pruners.get(key) if is_pruned(model) else None
    run = partial(_run_block, blocks_of(model)[key], pruner)
    if compiled is not None:
        settings: dict[str, Any] = {"fullgraph": True, "dynamic": False, "mode": torch_mode(compiled)}
        run = partial(torch.compile(with_own_code(_run_block), **settings), blocks_of(model)[key], pruner)
    return lambda index: run(met[index])


def _run_block(modules: BlockModules, pruner: PrunedBlock | None, met: Meeting) -> Any:
    if pruner is not None:
        pruner.context.batch = met.inputs
        if pruner.norm is not None:
            pruner.see_residual(pruner.norm, (met.residual,))
    if modules.is_bare:
        (first,) = modules.inputs
        return modules.projection(modules.output)(modules.activation(modules.projection(first)(met.hidden)))
    return modules.module(met.hidden, **met.given)
