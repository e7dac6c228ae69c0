"""A decoder layer whose two blocks are pruned per batch."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pp_lightning.pruned.attention import PrunedAttention
from pp_lightning.pruned.block import Choice, HowToRun
from pp_lightning.pruned.context import BatchContext
from pp_lightning.pruned.mlp import PrunedMLP
from pp_lightning.pruned.surroundings import Surroundings


class LayerPruner(nn.Module):
    """Runs a decoder layer's two blocks, pruned. It hangs on the layer as ``layer.pruner`` and owns no weight.

    What happens here is Python around :func:`run_batch`, which is all tensors: that part can be compiled.

    Args:
        attention: the attention block.
        mlp: the MLP block.
        context: shared by the layers of the model.
        parallel: probe earlier residuals, so that a probe need not wait for the block in front of it.

    Attributes:
        run_batch: :func:`run_batch`, or a compiled one.
    """

    def __init__(self, attention: PrunedAttention, mlp: PrunedMLP, context: BatchContext, *, parallel: bool) -> None:
        super().__init__()
        self.attention = attention
        self.mlp = mlp
        self.context = context
        self.parallel = parallel
        self.run_batch: BatchRunner = run_batch

    def forward(
        self, hidden: Tensor, mask: Tensor | None, rotation: tuple[Tensor, Tensor] | None, cache: Any
    ) -> Tensor:
        """(B, S, D) residual in, (B, S, D) residual out."""
        context = self.context
        if context.decoding:
            around = Surroundings(mask, rotation, cache=cache)
            middle = hidden + self.attention.decode(hidden, around)
            return middle + self.mlp.decode(middle, around)
        rows, tokens = hidden.shape[:2]
        blocks = (self.attention, self.mlp)
        purpose = {"parallel": self.parallel, "caching": cache is not None}
        how = tuple(block.how_to_run(rows, tokens, **purpose) for block in blocks)
        for block, own in zip(blocks, how, strict=True):
            block.prepare(own)
        if cache is not None:
            context.mark(cache)
        sizes = self.attention.method.probe_sizes(rows, tokens)
        lots = context.lots_of(self.attention.layer_index)
        around = Surroundings(mask, rotation, context.places(mask), sizes, lots, remember=not context.frozen)
        earlier = context.earlier if self.parallel else None
        result = self.run_batch(self, hidden, earlier, around, how, cache is not None)
        for block, choice, own in zip(blocks, (result.attention_choice, result.mlp_choice), how, strict=True):
            if choice is not None:
                block.hold(choice, own)
        context.earlier = result.middle if self.parallel else None
        if cache is not None:
            cache.update(*result.keys_and_values, self.attention.layer_index)
        return result.output


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
    pruner: LayerPruner,
    hidden: Tensor,
    earlier: Tensor | None,
    around: Surroundings,
    how: tuple[HowToRun, HowToRun],
    caching: bool,
) -> BatchResult:
    """A layer on a new batch: probe, score, choose, slice, run and remember, for both blocks.

    Everything in here traces into one graph, and layers of the same shape share it.

    Args:
        pruner: the layer's pruner.
        hidden: (B, S, D) entering the layer.
        earlier: the residual that the attention probe is taken from in parallel probing, where there is one.
        around: mask and positions.
        how: to run attention and MLP.
        caching: whether keys and values are wanted.
    """
    seen = SeenKeysAndValues()
    around = replace(around.of_batch(hidden.shape[1]), cache=seen if caching else None)
    attended, heads = pruner.attention(hidden, hidden if earlier is None else earlier, around, how[0])
    middle = hidden + attended
    transformed, channels = pruner.mlp(middle, hidden if pruner.parallel else middle, around.of_mlp(), how[1])
    return BatchResult(middle + transformed, middle, heads, channels, seen.keys_and_values)


BatchRunner = Callable[..., BatchResult]


class SeenKeysAndValues:
    """Stands in for a cache that is empty: everything there is to attend to is in the batch."""

    def __init__(self) -> None:
        self.keys_and_values: tuple[Tensor, ...] = ()

    def update(self, key: Tensor, value: Tensor, layer_index: int) -> tuple[Tensor, Tensor]:
        """Keep the whole batch's keys and values, (B, K, S, d)."""
        self.keys_and_values = (key, value)
        return key, value


def install_pruner(layer: nn.Module, pruner: LayerPruner) -> None:
    """Make a stock decoder layer run pruned: same object, same class, same weights, another ``forward``."""
    pruner.attention.lay_out_for_slicing()
    pruner.mlp.lay_out_for_slicing()
    layer.pruner = pruner
    layer.forward = MethodType(_pruned_forward, layer)


def remove_pruner(layer: nn.Module) -> None:
    """Undo :func:`install_pruner`."""
    pruner = layer.pruner
    assert isinstance(pruner, LayerPruner)
    pruner.attention.lay_out_as_stock()
    pruner.mlp.lay_out_as_stock()
    del layer.forward
    del layer.pruner


def publish_residual(norm: nn.Module, context: BatchContext) -> RemovableHandle:
    """Let parallel probing see the residual that enters a dense layer's MLP.

    Args:
        norm: the norm in front of that MLP.
        context: the model's context.
    """
    # partial, not a closure: a copy of the model then publishes to its own context
    return norm.register_forward_pre_hook(partial(_publish_input, context))


def _publish_input(context: BatchContext, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    context.publish(inputs[0])


def _pruned_forward(
    layer: nn.Module,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **_: Any,
) -> Tensor:
    """Stands in for a transformers decoder layer's ``forward``; the decoder passes everything by keyword."""
    pruner = layer.pruner
    assert isinstance(pruner, LayerPruner)
    output: Tensor = pruner(hidden_states, attention_mask, position_embeddings, past_key_values)
    return output
