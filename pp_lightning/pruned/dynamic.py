"""Putting a layer's pruned blocks together."""

from typing import Any

import torch
from torch import Tensor, nn

from pp_lightning.architectures import Architecture, ModelShape
from pp_lightning.blocks import Block, BlockPlan, block_modules
from pp_lightning.errors import UserError
from pp_lightning.methods.dynamic import DynamicMethod
from pp_lightning.pruned.attention import PrunedAttention
from pp_lightning.pruned.block import PrunedBlock
from pp_lightning.pruned.context import BatchContext
from pp_lightning.pruned.layer import LayerPruner
from pp_lightning.pruned.mlp import PrunedMLP
from pp_lightning.statistics import Statistics


def layer_pruner(
    layer: nn.Module,
    index: int,
    architecture: Architecture,
    shape: ModelShape,
    blocks: tuple[BlockPlan, BlockPlan],
    method: DynamicMethod,
    context: BatchContext,
    statistics: Statistics | None,
    release: bool,
    packs: bool = False,
) -> LayerPruner:
    """Build both pruned blocks of a stock layer, which is left as it is.

    Args:
        layer: a stock decoder layer.
        index: its index in the model.
        architecture: its description.
        shape: the dense model's sizes.
        blocks: how many units stay in attention and in the MLP.
        method: the policy.
        context: shared by the layers of the model.
        statistics: what histories start from; None for methods without.
        release: give up each block's statistics as its history is made.
        packs: keep slices between batches.

    Raises:
        UserError: a weight is not finite, or the statistics do not cover the layer.
    """

    def arguments(block: BlockPlan) -> dict[str, Any]:
        return {
            "modules": block_modules(architecture, layer, block.block),
            "units": block.units,
            "keep": block.keep,
            "method": method,
            "workspace": context.workspace,
            # the mean first: making the history may give up what it is made from
            "mean": _mean(statistics, index, block) if method.keeps_mean else None,
            "history": _history(statistics, index, block, release),
            "packs": packs,
        }

    core = layer.get_submodule(architecture.attention)
    attention = PrunedAttention(
        head_size=shape.head_size,
        scale=core.scaling,  # type: ignore[arg-type]
        layer_index=index,
        queries_per_key=shape.num_heads // shape.num_key_value_heads,
        **arguments(blocks[0]),
    )
    mlp = PrunedMLP(**arguments(blocks[1]))
    for name, block in ((Block.ATTENTION, attention), (Block.MLP, mlp)):
        _check_finite(block, name, index)
    return LayerPruner(attention, mlp, context, parallel=method.probe_source == "previous")


def _history(statistics: Statistics | None, index: int, block: BlockPlan, release: bool) -> Tensor | None:
    if statistics is None or block.keep == block.units.number:
        return None
    return statistics.second_moment(index, block.block, release=release)


def _mean(statistics: Statistics | None, index: int, block: BlockPlan) -> Tensor | None:
    if statistics is None or block.keep == block.units.number:
        return None
    return statistics.channel_moments(index, block.block)[0]


def _check_finite(block: PrunedBlock, name: Block, index: int) -> None:
    if not torch.isfinite(block.weight_norm).all():
        raise UserError(
            f"the {name.value} block of layer {index} has weights that are not finite: check the checkpoint"
        )
