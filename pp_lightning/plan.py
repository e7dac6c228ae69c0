"""From the asked ratio to a count for every block: what will be pruned, before anything is touched."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pp_lightning.blocks import AttentionUnit, Block, BlockPlan, ModelShape, units_of
from pp_lightning.errors import UserError
from pp_lightning.functional.budget import kept_channels, kept_heads, layer_ratio, rounded_up
from pp_lightning.methods.base import AllocationName, PruningMethod

Budget = Literal["flops", "params"]


@dataclass(frozen=True)
class Amounts:
    """How much is pruned, and how it is spread over the layers.

    Attributes:
        pruning_ratio: fraction of heads and MLP channels removed over the whole model, in [0, 1).
        attention_ratio: the same for attention alone; none takes ``pruning_ratio``.
        mlp_ratio: the same for MLPs alone; none takes ``pruning_ratio``.
        skip_layers: layers left dense. The others lose more, so that the model as a whole loses the ratio: of heads in
            the layers that have heads, of channels in those that have an MLP. Under ``global`` they only say, through
            the uniform plan, how much is saved: no layer is skipped by rule.
        round_to: MLP channels are kept in multiples of this.
        tensor_parallel: devices that are to share every block evenly: heads (key/value heads, where these go as a
            whole) and MLP channels are kept in multiples of this too.
        uniform_heads: keep the same number of heads in every layer, none skipped; MLPs differ as the method or
            ``allocation`` has it.
        allocation: ``uniform``, the same ratio in every layer that is not skipped; ``outliers``, ratios of the same
            mean, lower in layers with more outliers (after OCP); ``global``, where one ranking over the units of all
            layers decides at the same FLOPs; or ``searched``, which starts from that and moves units between blocks
            while the loss on held-out batches falls, for methods that update; none takes the method's own.
        floor: fraction of its units that every block keeps under ``global``; none takes 0.35 in attention and 0.25 in
            MLPs, or 0.25 in both where that would leave too little to remove.
        budget: what ``global`` and ``searched`` leave as much of as the uniform plan: ``flops``, or ``params``, the
            weights of heads and MLPs.
        stays: fraction of that budget that they leave; none takes what the uniform plan leaves, in coarser steps.
    """

    pruning_ratio: float
    attention_ratio: float | None = None
    mlp_ratio: float | None = None
    skip_layers: Sequence[int] = (0, 1, 2)
    round_to: int = 64
    tensor_parallel: int = 1
    uniform_heads: bool = False
    allocation: AllocationName | None = None
    floor: float | None = None
    budget: Budget = "flops"
    stays: float | None = None

    def recorded(self) -> dict[str, Any]:
        """What a file keeps of the amounts; what came later than the first files only where it is not the default."""
        names = ["pruning_ratio", "attention_ratio", "mlp_ratio", "skip_layers", "round_to"]
        names += ["budget"] * (self.budget != "flops") + ["stays"] * (self.stays is not None)
        names += ["tensor_parallel"] * (self.tensor_parallel != 1) + ["uniform_heads"] * self.uniform_heads
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Plan:
    """The pruned layers and what happens to each of their blocks."""

    layers: tuple[int, ...]
    blocks: tuple[BlockPlan, BlockPlan]
    unit: AttentionUnit
    budget: Budget = "flops"
    stays: float | None = None

    def counted_tokens(self, tokens: int) -> int:
        """Length of the texts whose FLOPs are counted, of ``tokens`` that texts have; where weights are, none."""
        return tokens if self.budget == "flops" else 0


def make_plan(shape: ModelShape, method: PruningMethod, amounts: Amounts) -> Plan:
    """Counts for a model of this shape, the same in every layer that is pruned.

    Raises:
        UserError: no such layers, ratios that leave nothing, or multiples that do not divide the heads or under which
            nothing could go.
    """
    skipped = set(amounts.skip_layers)
    strangers = sorted(layer for layer in skipped if not 0 <= layer < shape.num_layers)
    if strangers:
        raise UserError(
            f"skip_layers names layer {strangers[0]}, but the model has layers 0 to {shape.num_layers - 1}: say []"
        )
    if amounts.uniform_heads:
        skipped = set()
    devices, round_to = amounts.tensor_parallel, amounts.round_to
    unit = method.attention_unit or AttentionUnit.default_for(shape)
    asked = {Block.ATTENTION: amounts.attention_ratio, Block.MLP: amounts.mlp_ratio}
    plans = []
    for block, own_ratio in asked.items():
        nominal = amounts.pruning_ratio if own_ratio is None else own_ratio
        pruned = block in method.blocks
        having = {layer for layer in range(shape.num_layers) if shape.has(layer, block) or not pruned}
        if not having:
            raise UserError(f"no layer of this model has heads or channels of {block.value} that can be pruned")
        ratio = layer_ratio(nominal, len(having), len(having & skipped))
        if not pruned:
            ratio = 0.0
        units = units_of(shape, block, unit)
        if block is Block.ATTENTION:
            _check_sharing(shape, units.number, ratio, devices)
            keep = rounded_up(kept_heads(units.number, ratio), units.number, devices) if ratio else units.number
            plans.append(BlockPlan(block, units, ratio, keep, devices, alike=amounts.uniform_heads))
        else:
            multiple = math.lcm(round_to, devices) if round_to > 0 else round_to
            _check_rounding(units.number, ratio, multiple)
            keep = kept_channels(units.number, ratio, multiple)
            plans.append(BlockPlan(block, units, ratio, keep, multiple))
    layers = tuple(layer for layer in range(shape.num_layers) if layer not in skipped)
    return Plan(layers, (plans[0], plans[1]), unit, amounts.budget, amounts.stays)


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
