"""From the asked ratio to a count for every block: what will be pruned, before anything is touched."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pp_lightning.blocks import AttentionUnit, Block, BlockPlan, ModelShape, units_of
from pp_lightning.errors import UserError
from pp_lightning.functional.budget import kept_channels, kept_heads, layer_ratio, rounded_up
from pp_lightning.methods.base import PruningMethod


@dataclass(frozen=True)
class Plan:
    """The pruned layers and what happens to each of their blocks.

    Attributes:
        layers: indices of the layers that are pruned, ascending.
        blocks: the plan of the attention block and of the MLP block.
        unit: what is pruned in attention.
    """

    layers: tuple[int, ...]
    blocks: tuple[BlockPlan, BlockPlan]
    unit: AttentionUnit


def make_plan(
    shape: ModelShape,
    method: PruningMethod,
    *,
    pruning_ratio: float,
    attention_ratio: float | None = None,
    mlp_ratio: float | None = None,
    skip_layers: Sequence[int] = (0, 1, 2),
    round_to: int = 64,
    tensor_parallel: int = 1,
    uniform_heads: bool = False,
) -> Plan:
    """Counts for a model of this shape.

    Args:
        shape: the dense model's sizes.
        method: says which blocks are pruned and by which units.
        pruning_ratio: fraction of units to remove over the whole model, in [0, 1).
        attention_ratio: the same for attention alone; None takes ``pruning_ratio``.
        mlp_ratio: the same for MLPs alone; None takes ``pruning_ratio``.
        skip_layers: layers left dense. The others lose more, so that the model as a whole loses the ratio: of heads in
            the layers that have heads, of channels in those that have an MLP.
        round_to: MLP channels are kept in multiples of this.
        tensor_parallel: devices that are to share every block evenly: heads (key/value heads, where these go as a
            whole) and MLP channels are kept in multiples of this too.
        uniform_heads: the same number of heads in every layer under any allocation. No layer is skipped then.

    Raises:
        UserError: no such layers, ratios that leave nothing, or multiples that do not divide the heads or under which
            nothing could go.
    """
    skipped = set(skip_layers)
    strangers = sorted(layer for layer in skipped if not 0 <= layer < shape.num_layers)
    if strangers:
        raise UserError(f"skip_layers names layer {strangers[0]}, but the model has layers 0 to {shape.num_layers - 1}")
    if uniform_heads:
        skipped = set()
    unit = method.attention_unit or AttentionUnit.default_for(shape)
    asked = {Block.ATTENTION: attention_ratio, Block.MLP: mlp_ratio}
    plans = []
    for block, own_ratio in asked.items():
        nominal = pruning_ratio if own_ratio is None else own_ratio
        pruned = block in method.blocks
        having = {layer for layer in range(shape.num_layers) if shape.has(layer, block) or not pruned}
        ratio = layer_ratio(nominal, len(having), len(having & skipped))
        if not pruned:
            ratio = 0.0
        units = units_of(shape, block, unit)
        if block is Block.ATTENTION:
            _check_sharing(shape, units.number, ratio, tensor_parallel)
            keep = rounded_up(kept_heads(units.number, ratio), units.number, tensor_parallel) if ratio else units.number
            plans.append(BlockPlan(block, units, ratio, keep, tensor_parallel, alike=uniform_heads))
        else:
            multiple = math.lcm(round_to, tensor_parallel) if round_to > 0 else round_to
            _check_rounding(units.number, ratio, multiple)
            keep = kept_channels(units.number, ratio, multiple)
            plans.append(BlockPlan(block, units, ratio, keep, multiple))
    layers = tuple(layer for layer in range(shape.num_layers) if layer not in skipped)
    return Plan(layers, (plans[0], plans[1]), unit)


def _check_rounding(num_channels: int, ratio: float, round_to: int) -> None:
    """Refuse a multiple that rounds every count up to all channels: the MLPs would stay whole without a word."""
    if ratio > 0.0 and round_to >= num_channels:
        raise UserError(
            f"round_to={round_to} keeps all {num_channels} channels of every MLP: lower round_to below {num_channels} "
            "(1 does not round), or set mlp_ratio to 0 to leave the MLPs whole"
        )


def _check_sharing(shape: ModelShape, number: int, ratio: float, devices: int) -> None:
    """Refuse devices that could not share the heads of a layer, dense or pruned, or for whom all would stay."""
    if devices < 1:
        raise UserError(f"tensor_parallel is a number of devices and must be at least 1, not {devices}")
    of = "heads" if number == shape.num_heads else "key/value heads"
    if number % devices and devices > 1:
        raise UserError(f"tensor_parallel={devices} does not divide the model's {number} {of}: lower it")
    if ratio > 0.0 and number == devices > 1:
        raise UserError(
            f"tensor_parallel={devices} keeps all {number} {of} of every layer: lower it, or set attention_ratio to 0 "
            "to leave attention whole"
        )
