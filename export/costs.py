"""What each layout costs and keeps, known before anything is written."""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from export.entries import entries_of, total_bytes, total_parameters
from export.layouts import LAYOUTS, Layout, Target, target_for
from export.sizes import PrunedSizes, Widths, flops_of
from pp_lightning.errors import UserError

_TOKENS = 1024


@dataclass(frozen=True)
class Costs:
    """A layout's price.

    Attributes:
        layout: its name.
        model_class: of transformers, that loads it; what stands in the way where none does.
        loads_in: who can read it.
        parameters: weights as written, padding included; 0 where the layout is impossible.
        parameters_ratio: relative to the dense model.
        flops_ratio: relative to the dense model, vocabulary projection included, one row of up to 1024 tokens.
        bytes: of the weights on disk.
        heads: smallest and largest number of query heads over the layers, as computed.
        channels: the same of MLP channels.
    """

    layout: Layout
    model_class: str
    loads_in: str = ""
    parameters: int = 0
    parameters_ratio: float = 0.0
    flops_ratio: float = 0.0
    bytes: int = 0
    heads: tuple[int, int] = (0, 0)
    channels: tuple[int, int] = (0, 0)


def costs_of(model: PreTrainedModel, target: Target) -> Costs:
    """The price of a target."""
    sizes = PrunedSizes.of(model)
    entries = entries_of(model, sizes, target)
    tokens = min(_TOKENS, model.config.max_position_embeddings)
    shape = sizes.shape
    dense = (Widths(shape.num_heads, shape.num_key_value_heads, shape.mlp_width),) * shape.num_layers
    parameters = total_parameters(entries)
    heads, channels = [w.heads for w in target.layers], [w.channels for w in target.layers]
    return Costs(
        layout=target.layout,
        model_class=target.model_class,
        loads_in=target.loads_in,
        parameters=parameters,
        parameters_ratio=parameters / dense_parameters(model.config),
        flops_ratio=flops_of(shape, target.layers, 1, tokens) / flops_of(shape, dense, 1, tokens),
        bytes=total_bytes(entries),
        heads=(min(heads), max(heads)),
        channels=(min(channels), max(channels)),
    )


def compare_layouts(model: PreTrainedModel) -> list[Costs]:
    """The price of every layout of a pruned model, also of those that cannot hold it.

    Raises:
        UserError: the model is pruned per batch.
    """
    sizes = PrunedSizes.of(model)
    table = []
    for layout in LAYOUTS:
        try:
            table.append(costs_of(model, target_for(layout, sizes)))
        except UserError as reason:
            table.append(Costs(layout, f"not possible: {str(reason).split(': use')[0]}"))
    return table


def dense_parameters(config: PreTrainedConfig) -> int:
    """Weights of the model before pruning, from its config alone."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
