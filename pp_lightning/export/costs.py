"""What each layout costs and keeps, known before anything is written."""

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel

from pp_lightning.errors import UserError
from pp_lightning.export.entries import tensors_of
from pp_lightning.export.layouts import LAYOUTS, Layout, Target, target_for
from pp_lightning.export.sizes import PrunedSizes, flops_of
from pp_lightning.families import empty_model, longest_text, shape_of
from pp_lightning.flops import dense_flops

_TOKENS = 1024


@dataclass(frozen=True)
class Costs:
    """A layout's price.

    Attributes:
        model_class: of transformers, that loads it; what stands in the way where none does.
        loads_in: who can read it.
        parameters: weights as written, padding included; 0 where the layout is impossible.
        parameters_ratio: relative to the dense model.
        added_parameters: how many of them the pruned model in memory does not have: padding, biases that are zero, and
            keys and values that query heads shared before single ones of them were removed.
        flops_ratio: relative to the dense model, vocabulary projection included, one row of up to 1024 tokens.
        bytes: of the weights on disk.
        heads: smallest and largest number of query heads over the layers, as computed.
        key_heads: the same of key/value heads.
        channels: the same of MLP channels.
    """

    layout: Layout
    model_class: str
    loads_in: str = ""
    parameters: int = 0
    parameters_ratio: float = 0.0
    added_parameters: int = 0
    flops_ratio: float = 0.0
    bytes: int = 0
    heads: tuple[int, int] = (0, 0)
    key_heads: tuple[int, int] = (0, 0)
    channels: tuple[int, int] = (0, 0)


def costs_of(model: PreTrainedModel, target: Target) -> Costs:
    """The price of a target."""
    shape, tokens = shape_of(model.config), min(_TOKENS, longest_text(model.config))
    parameters = sum(entry.placeholder.numel() for entry in target.entries)
    return Costs(
        layout=target.layout,
        model_class=target.model_class,
        loads_in=target.loads_in,
        parameters=parameters,
        parameters_ratio=parameters / dense_parameters(model.config),
        added_parameters=parameters - sum(tensor.numel() for tensor in tensors_of(model).values()),
        flops_ratio=flops_of(shape, target.layers, tokens) / dense_flops(shape, 1, tokens).model,
        bytes=sum(entry.placeholder.nbytes for entry in target.entries),
        heads=_range(widths.heads for widths in target.layers),
        key_heads=_range(widths.groups for widths in target.layers),
        channels=_range(widths.channels for widths in target.layers),
    )


def compare_layouts(model: PreTrainedModel) -> list[Costs]:
    """The price of every layout of a pruned model, also of those that cannot hold it."""
    PrunedSizes.of(model)
    table = []
    for layout in LAYOUTS:
        try:
            table.append(costs_of(model, target_for(layout, model)))
        except UserError as reason:
            table.append(Costs(layout, f"not possible: {str(reason).split(': use')[0]}"))
    return table


def dense_parameters(config: PreTrainedConfig) -> int:
    """Weights of the model before pruning, from its config alone."""
    return sum(weight.numel() for weight in empty_model(config).parameters())


def _range(counts: Iterable[int]) -> tuple[int, int]:
    """Over the layers that have any."""
    found = [count for count in counts if count]
    return (min(found), max(found)) if found else (0, 0)


def in_words(counts: tuple[int, int]) -> str:
    """The smallest and the largest count of all layers; one number where they are equal."""
    return str(counts[0]) if counts[0] == counts[1] else f"{counts[0]}-{counts[1]}"
