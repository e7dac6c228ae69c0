"""A layer on a new batch, as functions of tensors and constants: what is compiled."""

from dataclasses import replace
from typing import NamedTuple, Protocol

from torch import Tensor

from pp_lightning.pruned.attention import PrunedAttention
from pp_lightning.pruned.block import PrunedBlock
from pp_lightning.pruned.choice import Choice, HowToRun
from pp_lightning.pruned.mlp import PrunedMLP
from pp_lightning.pruned.surroundings import Surroundings


class PrunedBlocks(Protocol):
    """A layer's two blocks, and whether their probes are taken from earlier residuals."""

    attention: PrunedAttention
    mlp: PrunedMLP
    parallel: bool


class BatchResult(NamedTuple):
    """What a layer gives for a new batch.

    Attributes:
        output: (B, S, D), the residual that leaves the layer.
        middle: (B, S, D), the residual between its blocks.
        attention_choice: what the attention block ran on; None where it keeps all units.
        mlp_choice: the same of the MLP block.
        keys_and_values: what a cache keeps, each (B, K, S, d); empty without caching.
    """

    output: Tensor
    middle: Tensor
    attention_choice: Choice | None
    mlp_choice: Choice | None
    keys_and_values: tuple[Tensor, ...]


def run_batch(
    layer: PrunedBlocks,
    hidden: Tensor,
    earlier: Tensor | None,
    around: Surroundings,
    how: tuple[HowToRun, HowToRun],
    caching: bool,
) -> BatchResult:
    """A layer on a new batch: probe, score, choose, slice, run and remember, for both blocks.

    Everything in here traces into one graph, and layers of the same shape share it.

    Args:
        layer: its blocks.
        hidden: (B, S, D) entering the layer.
        earlier: the residual that the attention probe is taken from in parallel probing, where there is one.
        around: mask and positions.
        how: to run attention and MLP.
        caching: whether keys and values are wanted.
    """
    seen = SeenKeysAndValues()
    around = replace(around.of_batch(hidden.shape[1]), cache=seen if caching else None)
    attended, heads = layer.attention(hidden, hidden if earlier is None else earlier, around, how[0])
    middle = hidden + attended
    transformed, channels = layer.mlp(middle, hidden if layer.parallel else middle, around.of_mlp(), how[1])
    return BatchResult(middle + transformed, middle, heads, channels, seen.keys_and_values)


def choose_ahead(block: PrunedBlock, probed: Tensor, around: Surroundings, keep: int) -> Choice:
    """A block's choice for a batch that need not have reached it yet.

    Args:
        block: attention or MLP.
        probed: (B, S, D), the earlier residual that the probe is taken from.
        around: mask and positions.
        keep: K.
    """
    return block.choose_from(block.parts.norm(probed), probed, around, keep)


def run_chosen(
    block: PrunedBlock,
    residual: Tensor,
    choice: Choice | None,
    around: Surroundings,
    how: HowToRun,
    caching: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A block on a choice that was made ahead.

    Args:
        block: attention or MLP.
        residual: (B, S, D) entering it.
        choice: what it runs on; None where it keeps all units.
        around: mask and positions.
        how: to run it.
        caching: whether keys and values are wanted.

    Returns:
        The residual that leaves the block, and what a cache keeps of it.
    """
    seen = SeenKeysAndValues()
    around = replace(around, cache=seen if caching else None)
    normed = block.parts.norm(residual)
    output = block.run_whole(normed, around) if choice is None else block.run(normed, choice, around, how)
    return residual + output, seen.keys_and_values


class SeenKeysAndValues:
    """Stands in for a cache that is empty: everything there is to attend to is in the batch."""

    def __init__(self) -> None:
        self.keys_and_values: tuple[Tensor, ...] = ()

    def update(self, key: Tensor, value: Tensor, layer_index: int) -> tuple[Tensor, Tensor]:
        """Keep the whole batch's keys and values, (B, K, S, d)."""
        self.keys_and_values = (key, value)
        return key, value
