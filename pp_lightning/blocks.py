"""The two prunable blocks of a decoder layer: their modules, their units, and what a unit costs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from torch import Tensor, nn

from pp_lightning.architectures import Architecture, ModelShape


class Block(StrEnum):
    """A block of a decoder layer."""

    ATTENTION = "attention"
    MLP = "mlp"


class AttentionUnit(StrEnum):
    """What is pruned in attention when query heads share key/value heads."""

    QUERY_HEAD = "query_head"  # single query heads; k and v stay whole (as published)
    KV_GROUP = "kv_group"  # a key/value head with all its query heads

    @staticmethod
    def default_for(shape: ModelShape) -> "AttentionUnit":
        """Key/value groups where query heads share them, single heads elsewhere."""
        return AttentionUnit.KV_GROUP if shape.grouped else AttentionUnit.QUERY_HEAD


@dataclass(frozen=True)
class Units:
    """The prunable units of one block.

    Attributes:
        number: U.
        channels: columns of the output matrix in one unit.
        cost: weights in one unit, over every matrix of the block.
    """

    number: int
    channels: int
    cost: int


def units_of(shape: ModelShape, block: Block, unit: AttentionUnit) -> Units:
    """The units of a block of a model with this shape."""
    d, hidden = shape.head_size, shape.hidden_size
    if block is Block.MLP:
        return Units(number=shape.mlp_width, channels=1, cost=(3 if shape.gated else 2) * hidden)
    if not shape.grouped:
        return Units(number=shape.num_heads, channels=d, cost=4 * d * hidden)
    if unit is AttentionUnit.QUERY_HEAD:
        return Units(number=shape.num_heads, channels=d, cost=2 * d * hidden)
    queries = shape.num_heads // shape.num_key_value_heads
    return Units(number=shape.num_key_value_heads, channels=queries * d, cost=(2 * queries + 2) * d * hidden)


@dataclass(frozen=True)
class BlockPlan:
    """What happens to one block in every pruned layer.

    Attributes:
        block: which block.
        units: its units.
        ratio: fraction to remove in a pruned layer, before rounding.
        keep: units that stay under uniform ratios.
        round_to: kept counts are multiples of this (1 in attention).
    """

    block: Block
    units: Units
    ratio: float
    keep: int
    round_to: int


@dataclass(frozen=True)
class BlockModules:
    """The modules of one block of one layer. They stay owned by the layer; this only points at them.

    Attributes:
        norm: the norm in front of the block.
        inputs: projections into the block by role: ``query``, ``key``, ``value`` or ``gate``, ``up``.
        output: the output matrix's projection, weight (D, C).
        extras: other modules by role: ``query_norm``, ``key_norm``, ``activation``.
        names: path of every projection inside the layer, by role (``output`` included).
    """

    norm: nn.Module
    inputs: Mapping[str, nn.Linear]
    output: nn.Linear
    extras: Mapping[str, nn.Module] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def output_weight(self) -> Tensor:
        """The matrix whose input columns are scored, (D, C)."""
        return self.output.weight


def block_modules(architecture: Architecture, layer: nn.Module, block: Block) -> BlockModules:
    """Find a block's modules inside a decoder layer."""
    a = architecture
    if block is Block.ATTENTION:
        names = {"query": a.query, "key": a.key, "value": a.value, "output": a.attention_output}
        norm, optional = a.attention_norm, {"query_norm": a.query_norm, "key_norm": a.key_norm}
    else:
        names = {"up": a.up, "output": a.down} | ({"gate": a.gate} if a.gate else {})
        norm, optional = a.mlp_norm, {"activation": a.activation}
    extras = {role: layer.get_submodule(path) for role, path in optional.items() if _has(layer, path)}
    linear = {role: _linear(layer, path) for role, path in names.items()}
    inputs = {role: module for role, module in linear.items() if role != "output"}
    return BlockModules(layer.get_submodule(norm), inputs, linear["output"], extras, names)


def _has(layer: nn.Module, path: str) -> bool:
    try:
        layer.get_submodule(path)
    except AttributeError:
        return False
    return True


def _linear(layer: nn.Module, path: str) -> nn.Linear:
    module = layer.get_submodule(path)
    assert isinstance(module, nn.Linear), f"{path} is a {type(module).__name__}, expected a Linear"
    return module
