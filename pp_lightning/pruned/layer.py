"""A decoder layer whose two blocks are pruned per batch."""

from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pp_lightning.pruned.attention import PrunedAttention
from pp_lightning.pruned.block import Surroundings
from pp_lightning.pruned.context import BatchContext
from pp_lightning.pruned.mlp import PrunedMLP


class LayerPruner(nn.Module):
    """Runs a decoder layer's two blocks, pruned. It hangs on the layer as ``layer.pruner`` and owns no weight.

    Args:
        attention: the attention block.
        mlp: the MLP block.
        context: shared by the layers of the model.
        parallel: probe earlier residuals, so that a probe need not wait for the block in front of it.
    """

    def __init__(self, attention: PrunedAttention, mlp: PrunedMLP, context: BatchContext, *, parallel: bool) -> None:
        super().__init__()
        self.attention = attention
        self.mlp = mlp
        self.context = context
        self.parallel = parallel

    def forward(self, hidden: Tensor, attention: Surroundings) -> Tensor:
        """(B, S, D) residual in, (B, S, D) residual out."""
        context = self.context
        if attention.cache is not None and not context.decoding:
            context.mark(attention.cache)
        probed = context.earlier if self.parallel and context.earlier is not None else hidden
        middle = hidden + self.attention(hidden, probed, attention)
        context.earlier = middle if self.parallel else None
        return middle + self.mlp(middle, hidden if self.parallel else middle, Surroundings(mask=attention.mask))


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
    output: Tensor = pruner(hidden_states, Surroundings(attention_mask, position_embeddings, past_key_values))
    return output
