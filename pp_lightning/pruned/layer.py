"""A decoder layer whose two blocks are pruned per batch."""

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pp_lightning.forwards import replace_forward, restore_forward
from pp_lightning.pruned.attention import PrunedAttention
from pp_lightning.pruned.batch import BatchResult, choose_ahead, run_batch, run_chosen
from pp_lightning.pruned.block import PrunedBlock
from pp_lightning.pruned.caches import has_fixed_size
from pp_lightning.pruned.choice import Choice, HowToRun
from pp_lightning.pruned.context import BatchContext
from pp_lightning.pruned.mlp import PrunedMLP
from pp_lightning.pruned.streams import Ahead, SideStream
from pp_lightning.pruned.surroundings import Surroundings


class LayerPruner(nn.Module):
    """Runs a decoder layer's two blocks, pruned. It hangs on the layer as ``layer.pruner`` and owns no weight.

    What happens here is Python around the functions of :mod:`pp_lightning.pruned.batch`, which are all tensors: these
    can be compiled.

    Args:
        attention: the attention block.
        mlp: the MLP block.
        context: shared by the layers of the model.
        parallel: probe earlier residuals, so that a probe need not wait for the block in front of it.

    Attributes:
        run_batch: :func:`run_batch`, or a compiled one: the whole layer.
        choose_ahead: :func:`choose_ahead`, or a compiled one: a parallel probe on a stream of its own.
        run_chosen: :func:`run_chosen`, or a compiled one: a block whose choice was made there.
    """

    def __init__(self, attention: PrunedAttention, mlp: PrunedMLP, context: BatchContext, *, parallel: bool) -> None:
        super().__init__()
        self.attention = attention
        self.mlp = mlp
        self.context = context
        self.parallel = parallel
        self.run_batch: Callable[..., BatchResult] = run_batch
        self.choose_ahead: Callable[..., Choice] = choose_ahead
        self.run_chosen: Callable[..., tuple[Tensor, tuple[Tensor, ...]]] = run_chosen

    def forward(
        self, hidden: Tensor, mask: Tensor | None, rotation: tuple[Tensor, Tensor] | None, cache: Any
    ) -> Tensor:
        """(B, S, D) residual in, (B, S, D) residual out."""
        if self.context.decoding:
            around = Surroundings(mask, rotation, cache=cache)
            middle = hidden + self.attention.decode(hidden, around)
            return middle + self.mlp.decode(middle, around)
        if has_fixed_size(cache):  # made to be continued
            self.attention.expect_decoding()
            self.mlp.expect_decoding()
        result = self._run_batch(hidden, mask, rotation, cache)
        if has_fixed_size(cache):
            self.attention.hold_slices()
            self.mlp.hold_slices()
        return result.output

    def _run_batch(
        self, hidden: Tensor, mask: Tensor | None, rotation: tuple[Tensor, Tensor] | None, cache: Any
    ) -> BatchResult:
        """A new batch: how it is run, running it, and what is kept of it."""
        context = self.context
        rows, tokens = hidden.shape[:2]
        blocks = (self.attention, self.mlp)
        purpose = {"parallel": self.parallel, "caching": cache is not None}
        how = (self.attention.how_to_run(rows, tokens, **purpose), self.mlp.how_to_run(rows, tokens, **purpose))
        for block, own in zip(blocks, how, strict=True):
            block.prepare(own)
        if cache is not None:
            context.mark(cache)
        sizes = self.attention.method.probe_sizes(rows, tokens)
        lots = context.lots_of(self.attention.layer_index, hidden.device)
        places = context.places(mask, hidden.device)
        around = Surroundings(mask, rotation, places, sizes, lots, remember=not context.frozen)
        side = context.side_stream(hidden.device) if self.parallel else None
        if side is None:
            earlier = context.earlier_on(hidden.device) if self.parallel else None
            probed = None if earlier is None else earlier.residual
            result = self.run_batch(self, hidden, probed, around, how, cache is not None)
        else:
            result = self._run_beside(side, hidden, around, how, cache is not None)
        for block, choice, own in zip(blocks, (result.attention_choice, result.mlp_choice), how, strict=True):
            if choice is not None:
                block.hold(choice, own)
        if self.parallel and side is None:
            context.publish(result.middle)
        if cache is not None:
            cache.update(*result.keys_and_values, self.attention.layer_index)
        return result

    def _run_beside(
        self, side: SideStream, hidden: Tensor, around: Surroundings, how: tuple[HowToRun, HowToRun], caching: bool
    ) -> BatchResult:
        """:func:`run_batch` with both choices on a side stream.

        The one for attention runs beside the MLP of the layer in front, if the host is ahead of the device; the one for
        the MLP beside this layer's attention.
        """
        context, around = self.context, around.of_batch(hidden.shape[1])
        earlier = context.earlier_on(hidden.device)
        entered = side.moment()
        probed, since = hidden, entered
        if earlier is not None:
            probed, since = earlier.residual, earlier.since or entered
        heads = self._start(side, self.attention, since, probed, around, how[0])
        channels = self._start(side, self.mlp, entered, hidden, around.of_mlp(), how[1])
        head_choice = None if heads is None else side.join(heads)
        middle, seen = self.run_chosen(self.attention, hidden, head_choice, around, how[0], caching)
        context.publish(middle)
        channel_choice = None if channels is None else side.join(channels)
        output, _ = self.run_chosen(self.mlp, middle, channel_choice, around.of_mlp(), how[1], False)
        return BatchResult(output, middle, head_choice, channel_choice, seen)

    def _start(
        self,
        side: SideStream,
        block: PrunedBlock,
        since: torch.Event,
        probed: Tensor,
        around: Surroundings,
        how: HowToRun,
    ) -> Ahead | None:
        if not block.chooses:
            return None
        return side.start(since, partial(self.choose_ahead, block, probed, around, how.keep))


def install_pruner(layer: nn.Module, pruner: LayerPruner) -> None:
    """Make a stock decoder layer run pruned: same object, same class, same weights, another ``forward``."""
    pruner.attention.slices.lay_out_for_slicing()
    pruner.mlp.slices.lay_out_for_slicing()
    layer.pruner = pruner
    replace_forward(layer, MethodType(_pruned_forward, layer))


def remove_pruner(layer: nn.Module) -> None:
    """Undo :func:`install_pruner`."""
    pruner = layer.pruner
    assert isinstance(pruner, LayerPruner)
    pruner.attention.slices.lay_out_as_stock()
    pruner.mlp.slices.lay_out_as_stock()
    restore_forward(layer)
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
