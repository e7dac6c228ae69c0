"""The two prunable blocks of a transformer layer: their units, and what a unit costs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from torch import nn


class Block(StrEnum):
    """A block of a transformer layer."""

    ATTENTION = "attention"
    MLP = "mlp"


BlockKey = tuple[int, Block]  # layer index and block


class AttentionUnit(StrEnum):
    """What is pruned in attention when query heads share key/value heads."""

    QUERY_HEAD = "query_head"  # single query heads; k and v stay whole (as published)
    KV_GROUP = "kv_group"  # a key/value head with all its query heads

    @staticmethod
    def default_for(shape: "ModelShape") -> "AttentionUnit":
        """Key/value groups where query heads share several of them, single heads elsewhere."""
        several = 1 < shape.num_key_value_heads < shape.num_heads
        return AttentionUnit.KV_GROUP if several else AttentionUnit.QUERY_HEAD


@dataclass(frozen=True)
class ModelShape:
    """The sizes that pruning and FLOPs depend on.

    Attributes:
        num_layers: L.
        hidden_size: D.
        num_heads: H, query heads.
        num_key_value_heads: G.
        head_size: d.
        mlp_width: F.
        gated: whether the MLP has a gate beside its up projection.
        vocabulary: rows of the output projection; 0 where there is none.
        vocabulary_inputs: its columns; D, or fewer where embeddings are narrower than the layers.
        outer_weights: weights of the matrices between embeddings and layers, as there are where these differ in width.
        query_rows: rows of the query projection in one head; d, or 2 d where it also makes a gate.
        without: by block, layers that have no such block, but something else in its place.
        unknown: where layers have parts beside these blocks, or blocks that no formula here is for: makes the model
            without memory for its weights, to count their FLOPs.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    head_size: int
    mlp_width: int
    gated: bool
    vocabulary: int
    query_rows: int = 0
    vocabulary_inputs: int = 0
    outer_weights: int = 0
    without: Mapping[Block, frozenset[int]] = field(default_factory=dict)
    unknown: Callable[[], nn.Module] | None = None

    def __post_init__(self) -> None:
        if not self.query_rows:
            object.__setattr__(self, "query_rows", self.head_size)
        if not self.vocabulary_inputs:
            object.__setattr__(self, "vocabulary_inputs", self.hidden_size)

    @property
    def grouped(self) -> bool:
        """Whether query heads share key/value heads."""
        return self.num_key_value_heads < self.num_heads

    @property
    def queries_per_key(self) -> int:
        """Query heads of one key/value head, H / G."""
        return self.num_heads // self.num_key_value_heads

    def has(self, layer: int, block: Block) -> bool:
        """Whether a layer has this block."""
        return layer not in self.without.get(block, ())

    @property
    def keys(self) -> list[BlockKey]:
        """Every block of every layer."""
        return [(layer, block) for layer in range(self.num_layers) for block in Block if self.has(layer, block)]


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
    d, rows, hidden = shape.head_size, shape.query_rows, shape.hidden_size
    if block is Block.MLP:
        return Units(number=shape.mlp_width, channels=1, cost=(3 if shape.gated else 2) * hidden)
    if not shape.grouped:
        return Units(number=shape.num_heads, channels=d, cost=(rows + 3 * d) * hidden)
    if unit is AttentionUnit.QUERY_HEAD:
        return Units(number=shape.num_heads, channels=d, cost=(rows + d) * hidden)
    queries = shape.queries_per_key
    return Units(shape.num_key_value_heads, channels=queries * d, cost=(queries * (rows + d) + 2 * d) * hidden)


@dataclass(frozen=True)
class BlockPlan:
    """What happens to one block in every pruned layer.

    Attributes:
        ratio: fraction to remove in a pruned layer, before rounding.
        keep: units that stay under uniform ratios.
        round_to: kept counts are multiples of this.
        alike: every layer keeps ``keep`` units, whatever the allocation.
    """

    block: Block
    units: Units
    ratio: float
    keep: int
    round_to: int
    alike: bool = False
