"""FLOPs of dense and pruned models.

A multiply-add is 2. Attention counts the full S x S products. Norms, softmax, activations, embeddings, rotary positions
and top-k are 0. Counts are of one batch of B rows and S tokens, as Python integers.

Blocks that can be pruned have formulas. What else is in a layer (linear attention, routers, experts, blocks that cannot
be pruned) is what torch counts of whole layers beyond these (:mod:`pp_lightning.counting`). It is the same in a dense
and in a pruned model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from pp_lightning.blocks import AttentionUnit, Block, BlockKey, ModelShape, units_of
from pp_lightning.counting import counted_flops
from pp_lightning.functional.budget import one_projection_is_cheaper
from pp_lightning.methods.dynamic import DynamicMethod
from pp_lightning.pruning import Pruning


@dataclass(frozen=True)
class Flops:
    """FLOPs of one batch.

    Attributes:
        blocks: of each block of each layer, without its probe.
        probe: of all probes, with putting back the means that they show.
        vocabulary: of the projection to the vocabulary.
        other: of all that is in layers beside these blocks.
        outer: of the matrices in front of the layers and behind them, where embeddings have another width.
    """

    blocks: Mapping[BlockKey, int]
    probe: int
    vocabulary: int
    other: int = 0
    outer: int = 0

    @property
    def layers(self) -> int:
        """All layers, probes included, without what is around them (``flops_layers``)."""
        return sum(self.blocks.values()) + self.probe + self.other

    @property
    def model(self) -> int:
        """The whole model, probes included (``flops_model``)."""
        return self.layers + self.outer + self.vocabulary

    def __add__(self, other: "Flops") -> "Flops":
        """Of two batches together."""
        blocks = {key: count + other.blocks[key] for key, count in self.blocks.items()}
        sums = {name: getattr(self, name) + getattr(other, name) for name in ("probe", "vocabulary", "other", "outer")}
        return Flops(blocks, **sums)


def dense_flops(shape: ModelShape, rows: int, tokens: int) -> Flops:
    """FLOPs of the dense model on a (B, S) batch."""
    whole = {
        Block.ATTENTION: attention_flops(shape, rows, tokens, shape.num_heads, shape.num_key_value_heads),
        Block.MLP: mlp_flops(shape, rows, tokens, shape.mlp_width),
    }
    blocks = {key: whole[key[1]] for key in shape.keys}
    other = 0 if shape.unknown is None else counted_flops(shape.unknown, rows, tokens) - sum(blocks.values())
    vocabulary = _linear(rows * tokens, shape.vocabulary_inputs, shape.vocabulary)
    return Flops(blocks, 0, vocabulary, other, outer=2 * rows * tokens * shape.outer_weights)


def pruned_flops(shape: ModelShape, pruning: Pruning, rows: int, tokens: int, *, sliced_anyway: bool = False) -> Flops:
    """FLOPs of a pruned model on a (B, S) batch, probes included.

    Args:
        shape: the model's sizes.
        pruning: what stays, and by which method.
        rows: B.
        tokens: S.
        sliced_anyway: whether the batch is a prompt of a model that decodes, which leaves its slices for that.
    """
    dense = dense_flops(shape, rows, tokens)
    blocks = dict(dense.blocks)
    probe = 0
    for (layer, block), keep in pruning.keep.items():
        if block is Block.MLP:
            whole = keep == shape.mlp_width
            blocks[layer, block] = mlp_flops(shape, rows, tokens, keep)
        else:
            heads, keys = kept_head_counts(shape, pruning.plan.unit, keep)
            whole = heads == shape.num_heads
            blocks[layer, block] = attention_flops(shape, rows, tokens, heads, keys)
        if isinstance(pruning.method, DynamicMethod) and not whole:
            probe += choosing_flops(
                shape, block, pruning.method, pruning.plan.unit, keep, rows, tokens, sliced_anyway=sliced_anyway
            )
            probe += compensation_flops(shape, block) if pruning.method.restores_means else 0
    return Flops(blocks, probe, dense.vocabulary, dense.other, dense.outer)


def attention_flops(shape: ModelShape, rows: int, tokens: int, heads: int, keys: int) -> int:
    """One attention block on (B, S) with this many query heads and key/value heads."""
    return attention_front_flops(shape, rows, tokens, heads, keys) + _linear(
        rows * tokens, heads * shape.head_size, shape.hidden_size
    )


def attention_front_flops(shape: ModelShape, rows: int, tokens: int, heads: int, keys: int) -> int:
    """Query, key and value projections and both products of attention: all but the output projection."""
    width = heads * shape.query_rows + 2 * keys * shape.head_size
    products = 2 * 2 * rows * heads * tokens * tokens * shape.head_size
    return _linear(rows * tokens, shape.hidden_size, width) + products


def mlp_flops(shape: ModelShape, rows: int, tokens: int, channels: int) -> int:
    """One MLP block on (B, S) with this many channels."""
    return mlp_front_flops(shape, rows, tokens, channels) + _linear(rows * tokens, channels, shape.hidden_size)


def mlp_front_flops(shape: ModelShape, rows: int, tokens: int, channels: int) -> int:
    """Up projection, and gate where there is one: all but the down projection."""
    return (2 if shape.gated else 1) * _linear(rows * tokens, shape.hidden_size, channels)


def probe_flops(shape: ModelShape, block: Block, rows: int, tokens: int) -> int:
    """The probe of one block: the front half of the dense block on the probe's rows and tokens."""
    if block is Block.MLP:
        return mlp_front_flops(shape, rows, tokens, shape.mlp_width)
    return attention_front_flops(shape, rows, tokens, shape.num_heads, shape.num_key_value_heads)


def choosing_flops(
    shape: ModelShape,
    block: Block,
    method: DynamicMethod,
    unit: AttentionUnit,
    keep: int,
    rows: int,
    tokens: int,
    *,
    sliced_anyway: bool = False,
) -> int:
    """What choosing for a (B, S) batch adds to one pruned block: its probe, or what a shared projection does too much.

    Args:
        shape: the model's sizes.
        block: which block.
        method: says how large the probe is, and where it is taken from.
        unit: what is pruned in attention.
        keep: units that stay.
        rows: B.
        tokens: S.
        sliced_anyway: see :func:`pruned_flops`.
    """
    probe = method.probe_sizes(rows, tokens)
    number = units_of(shape, block, unit).number
    places = probe[0] * probe[1], rows * tokens
    shared = one_projection_is_cheaper(*places, keep, number, sliced_anyway=sliced_anyway)
    if not shared or method.probe_source == "previous":
        return probe_flops(shape, block, *probe)
    if block is Block.MLP:
        return mlp_front_flops(shape, rows, tokens, shape.mlp_width) - mlp_front_flops(shape, rows, tokens, keep)
    heads, keys = kept_head_counts(shape, unit, keep)
    left_out = (shape.num_heads - heads) * shape.query_rows + 2 * (shape.num_key_value_heads - keys) * shape.head_size
    projections = _linear(rows * tokens, shape.hidden_size, left_out)
    return projections + 2 * 2 * probe[0] * shape.num_heads * probe[1] ** 2 * shape.head_size


def compensation_flops(shape: ModelShape, block: Block) -> int:
    """Putting back the mean of a block's removed channels: its output matrix times one vector, once a batch."""
    channels = shape.mlp_width if block is Block.MLP else shape.num_heads * shape.head_size
    return _linear(1, channels, shape.hidden_size)


def kept_head_counts(shape: ModelShape, unit: AttentionUnit, keep: int) -> tuple[int, int]:
    """Query heads and key/value heads computed when ``keep`` units of attention stay."""
    if not shape.grouped:
        return keep, keep
    if unit is AttentionUnit.QUERY_HEAD:
        return keep, shape.num_key_value_heads
    return keep * shape.num_heads // shape.num_key_value_heads, keep


def _linear(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def prompt_flops(
    shape: ModelShape, pruning: Pruning | None, rows: int, tokens: int, *, sliced_anyway: bool = False
) -> Flops:
    """FLOPs of a (B, S) batch that fills a cache: dense, where the pruning runs such a prompt dense.

    Args:
        shape: the model's sizes.
        pruning: what stays; None is the dense model.
        rows: B.
        tokens: S.
        sliced_anyway: see :func:`pruned_flops`.
    """
    if pruning is None:
        return dense_flops(shape, rows, tokens)
    if pruning.context is None or not pruning.context.runs_dense(rows, tokens):
        return pruned_flops(shape, pruning, rows, tokens, sliced_anyway=sliced_anyway)
    dense, restores = dense_flops(shape, rows, tokens), pruning.method.restores_means
    return replace(dense, probe=sum(compensation_flops(shape, key[1]) for key in pruning.pruners) if restores else 0)


def continued_flops(shape: ModelShape, pruning: Pruning | None, rows: int, past: int, tokens: int = 1) -> Flops:
    """FLOPs of S tokens a row that follow ``past`` others in a cache, on the choice that is held.

    Channels that are chosen again once in S tokens, with ``refresh``, count as a probe of these tokens.

    Args:
        shape: the model's sizes.
        pruning: what stays; None is the dense model.
        rows: B.
        past: tokens in front of them.
        tokens: S.
    """
    blocks = _continued_blocks(shape, pruning, rows, past, tokens)
    other = 0
    if shape.unknown is not None:
        dense = _continued_blocks(shape, None, rows, past, tokens)
        other = counted_flops(shape.unknown, rows, tokens, past) - sum(dense.values())
    vocabulary = _linear(rows * tokens, shape.vocabulary_inputs, shape.vocabulary)
    context = None if pruning is None else pruning.context
    again = 0
    if pruning is not None and context is not None and context.refresh is not None:
        mlps = [block for _, block in pruning.pruners if block is Block.MLP]
        once = mlp_front_flops(shape, rows, tokens, shape.mlp_width)
        again = len(mlps) * (once + (compensation_flops(shape, Block.MLP) if pruning.method.restores_means else 0))
    return Flops(blocks, again, vocabulary, other, outer=2 * rows * tokens * shape.outer_weights)


def _continued_blocks(
    shape: ModelShape, pruning: Pruning | None, rows: int, past: int, tokens: int
) -> dict[BlockKey, int]:
    keep, blocks = {} if pruning is None else pruning.keep, {}
    for key in shape.keys:
        if key[1] is Block.MLP:
            blocks[key] = mlp_flops(shape, rows, tokens, keep.get(key, shape.mlp_width))
            continue
        heads, keys = shape.num_heads, shape.num_key_value_heads
        if pruning is not None and key in keep:
            heads, keys = kept_head_counts(shape, pruning.plan.unit, keep[key])
        width = heads * (shape.query_rows + shape.head_size) + 2 * keys * shape.head_size
        products = 2 * 2 * rows * tokens * heads * (past + tokens) * shape.head_size
        blocks[key] = _linear(rows * tokens, shape.hidden_size, width) + products
    return blocks
