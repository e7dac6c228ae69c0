"""Static pruning: a stock layer whose projections are replaced by narrower ones, for good."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pp_lightning.blocks import AttentionUnit, ModelShape
from pp_lightning.errors import UserError
from pp_lightning.families import BlockModules
from pp_lightning.functional.selection import take_columns, take_unit_rows
from pp_lightning.interfaces import replace_forward
from pp_lightning.methods.base import StaticChoice
from pp_lightning.parallel import Reduced, is_sharded
from pp_lightning.pruned.projection import PrunedProjection
from pp_lightning.pruned.runner import BlockRunner


class TakeHeads:
    """Forward hook of a key or value projection that stays whole: each kept query head gets its own."""

    def __init__(self, heads: Tensor, size: int) -> None:
        self.heads = heads
        self.size = size

    def __call__(self, projection: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """(..., G * d) to (..., K * d)."""
        self.heads = self.heads.to(output.device)
        return output.unflatten(-1, (-1, self.size)).index_select(-2, self.heads).flatten(-2)


@dataclass
class SlicedBlock:
    """What a block was before it was sliced."""

    runner: BlockRunner
    dense: Mapping[str, nn.Module]
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    hooks: list[RemovableHandle] = field(default_factory=list)


def check_sliceable(modules: BlockModules, what: str) -> None:
    """Refuse projections that are more than a matrix."""
    if is_sharded(modules.layer):
        raise UserError(f"the weights are sharded, and {what} whole ones: prune the model before it is sharded")
    for name in modules.names:
        projection = modules.projection(name)
        if not modules.is_linear(projection):
            kind = f"{type(projection).__module__.partition('.')[0]} {type(projection).__name__}"
            raise UserError(
                f"{modules.path_of(name)} is a {kind}, and {what} plain Linear layers alone: merge or unload adapters, "
                "load unquantised weights"
            )


def slice_block(modules: BlockModules, shape: ModelShape, unit: AttentionUnit, choice: StaticChoice) -> SlicedBlock:
    """Replace a block's projections by slices of the kept units. The layer's own ``forward`` then runs them."""
    kept = choice.kept
    runner = BlockRunner(modules, shape, unit, len(kept))
    sliced = SlicedBlock(runner, {one.name: one.module for one in runner.projections})
    module, like = modules.module, runner.output.module
    for one in runner.inputs:
        if one.repeats > 1:
            sliced.hooks.append(one.module.register_forward_hook(TakeHeads(kept // one.repeats, shape.head_size)))
        else:
            setattr(module, one.name, _narrow(one, kept))
    columns = choice.columns
    if columns is None:
        columns = take_columns(like.weight, kept, runner.units.channels)
    columns = columns.to(like.weight.dtype).contiguous()
    output = _linear_like(like, columns, _total_bias(like, choice.bias))
    reduced = runner.output.displaced
    if isinstance(reduced, Reduced):
        replace_forward(output, replace(reduced, module=output))
    setattr(module, modules.output, output)
    if runner.fields is not None:
        runner.fields.install()
        sliced.parameters = runner.fields.narrow_for_good(kept)
    return sliced


def restore_block(sliced: SlicedBlock) -> None:
    """Put the dense projections back, with the device and dtype that the slices have now."""
    module = sliced.runner.module
    narrow = getattr(module, sliced.runner.modules.output).weight
    for name, dense in sliced.dense.items():
        setattr(module, name, dense.to(narrow.device, narrow.dtype))
    for hook in sliced.hooks:
        hook.remove()
    if sliced.runner.fields is not None:
        whole = {name: one.to(narrow.device, narrow.dtype) for name, one in sliced.parameters.items()}
        sliced.runner.fields.put({n: nn.Parameter(one, sliced.parameters[n].requires_grad) for n, one in whole.items()})
        sliced.runner.fields.remove()


def _narrow(one: PrunedProjection, kept: Tensor) -> nn.Linear:
    weight, bias = one.module.weight, one.module.bias
    own_bias = None if bias is None else take_unit_rows(bias, one.rows, kept)
    return _linear_like(one.module, take_unit_rows(weight, one.rows, kept), own_bias)


def _linear_like(module: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear: nn.Linear = type(module)(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=module.weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=module.weight.requires_grad)
    return linear.train(module.training)


def _total_bias(output: nn.Linear, bias: Tensor | None) -> Tensor | None:
    if bias is None:
        return None if output.bias is None else output.bias.clone()
    own = torch.zeros_like(bias) if output.bias is None else output.bias.float()
    return (own + bias).to(output.weight.dtype)
