"""Static pruning: a stock layer whose projections are replaced by narrower ones, for good."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pp_lightning.architectures import Architecture, ModelShape
from pp_lightning.blocks import Block, BlockPlan, block_modules
from pp_lightning.functional.selection import take_columns, take_rows
from pp_lightning.methods.base import StaticChoice


@dataclass(frozen=True)
class SlicedBlock:
    """What a block was before it was sliced: the dense projections by path, and a head count that was an attribute."""

    dense: Mapping[str, nn.Linear]
    attention_path: str
    head_count: str | None
    num_heads: int


def slice_block(
    layer: nn.Module,
    architecture: Architecture,
    shape: ModelShape,
    plan: BlockPlan,
    choice: StaticChoice,
) -> SlicedBlock:
    """Replace a block's projections by slices of the kept units. The layer's own ``forward`` then runs them.

    Args:
        layer: a stock decoder layer.
        architecture: its description.
        shape: the dense model's sizes.
        plan: which block, and its units; in attention with grouped queries these are whole key/value groups.
        choice: the kept units, and a bias for the block's output.

    Returns:
        What :func:`restore_block` needs.
    """
    modules, units, kept = block_modules(architecture, layer, plan.block), plan.units, choice.kept
    queries_per_key = shape.num_heads // shape.num_key_value_heads
    shared = {"key", "value"}
    for role, module in modules.inputs.items():
        rows = units.channels // queries_per_key if role in shared else units.channels
        module_bias = None if module.bias is None else take_rows(module.bias, kept, rows)
        layer.set_submodule(
            modules.names[role], _linear_like(module, take_rows(module.weight, kept, rows), module_bias)
        )
    output = modules.output
    columns = take_columns(output.weight, kept, units.channels).contiguous()
    layer.set_submodule(modules.names["output"], _linear_like(output, columns, _total_bias(output, choice.bias)))
    head_count = architecture.head_count if plan.block is Block.ATTENTION else None
    if head_count is not None:
        setattr(layer.get_submodule(architecture.attention), head_count, len(kept))
    dense = {modules.names[role]: module for role, module in {**modules.inputs, "output": output}.items()}
    return SlicedBlock(dense, architecture.attention, head_count, shape.num_heads)


def restore_block(layer: nn.Module, sliced: SlicedBlock) -> None:
    """Put the dense projections back, with the device and dtype that the slices have now."""
    for path, dense in sliced.dense.items():
        narrow = layer.get_submodule(path)
        assert isinstance(narrow, nn.Linear)
        layer.set_submodule(path, dense.to(narrow.weight.device, narrow.weight.dtype))
    if sliced.head_count is not None:
        setattr(layer.get_submodule(sliced.attention_path), sliced.head_count, sliced.num_heads)


def _linear_like(module: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=module.weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=module.weight.requires_grad)
    return linear.train(module.training)


def _total_bias(output: nn.Linear, bias: Tensor | None) -> Tensor | None:
    if bias is None:
        return None if output.bias is None else output.bias.clone()
    own = torch.zeros_like(bias) if output.bias is None else output.bias.float()
    return (own + bias).to(output.weight.dtype)
