"""A model run on many batches, all of them through one layer before the next one is looked at."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from pp_lightning.errors import UserError
from pp_lightning.families import layers_of
from pp_lightning.layerwise import LayerByLayer
from pp_lightning.methods.dynamic import DynamicMethod
from pp_lightning.progress import Steps, Tell, ignore_line
from pp_lightning.pruning import is_pruned, pruning_of


def goes_layer_by_layer(model: PreTrainedModel) -> bool:
    """Whether :func:`outputs_layer_by_layer` gives what the model gives: not where a layer probes for the next one."""
    method = pruning_of(model).method if is_pruned(model) else None
    return not isinstance(method, DynamicMethod) or method.probe_source != "previous"


def outputs_layer_by_layer(
    model: PreTrainedModel, batches: Sequence[Mapping[str, Any]], folder: Path | None = None, tell: Tell = ignore_line
) -> Iterator[Any]:
    """What the model gives for each batch, without a cache, bit for bit.

    A dynamic method chooses, and moves its histories, in the same order of batches; but a batch that is not finite in
    one layer only is remembered in the others.

    Args:
        model: dense or pruned, in memory or with its layers' weights on disk.
        batches: dictionaries with ``input_ids`` (B, S) and optionally ``attention_mask`` (B, S).
        folder: for hidden states; None keeps them in memory.
        tell: told of each layer.

    Raises:
        UserError: the model's layers are not called one after the other, or probe for each other.
    """
    if not goes_layer_by_layer(model):
        raise UserError("a layer whose probe is taken from the one in front of it cannot be run alone")
    context = pruning_of(model).context if is_pruned(model) else None
    begun = 0 if context is None else context.num_batches
    carried = LayerByLayer(model, batches, folder)
    number = len(layers_of(model))
    steps = Steps("evaluating", "layer", number)
    for index in range(number):
        if context is None:
            carried.advance()
        else:
            context.num_batches = begun  # random samples are drawn by it
            with context.only(index):
                carried.advance_inside(model)
        tell(steps.line(index + 1))
    for index in range(len(batches)):
        yield carried.output(model, index)
