"""What a pruned model is made of: how many units every layer has.

Read off the weights' shapes, so that every static method exports alike, whatever chose the units.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from pp_lightning.blocks import AttentionUnit, Block, ModelShape
from pp_lightning.errors import UserError
from pp_lightning.families import blocks_of, shape_of
from pp_lightning.flops import attention_flops, dense_flops, mlp_flops
from pp_lightning.pruning import is_pruned, pruning_of
from pp_lightning.shares import check_whole


class Widths(NamedTuple):
    """Units of one layer, 0 of what it does not have: query heads, key/value heads, MLP channels."""

    heads: int
    groups: int
    channels: int


@dataclass(frozen=True)
class PrunedSizes:
    """The sizes of a statically pruned model, as they are written.

    Attributes:
        config: the model's own, which still has the dense sizes.
        key_heads: of layers that lost single query heads of a group, by number: the key/value head (K,) of each that
            stays. No class gives query heads their share of keys one by one, so each is written with its own.
    """

    config: PreTrainedConfig
    shape: ModelShape
    layers: tuple[Widths, ...]
    key_heads: Mapping[int, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(model: PreTrainedModel) -> "PrunedSizes":
        """Read the sizes of a model; a dense one has the same widths everywhere."""
        check_exportable(model)
        if is_pruned(model) and pruning_of(model).pruners:
            raise UserError("a choice per batch fits no checkpoint: freeze it first, or export the graph (onnx, pt2)")
        shape, key_heads = shape_of(model.config), _key_heads(model)
        columns = {key: block.output_weight.shape[1] for key, block in blocks_of(model).items()}
        layers = []
        for index in range(shape.num_layers):
            heads = columns[index, Block.ATTENTION] // shape.head_size if (index, Block.ATTENTION) in columns else 0
            groups = heads if index in key_heads else heads and max(1, heads // shape.queries_per_key)
            layers.append(Widths(heads, groups, columns.get((index, Block.MLP), 0)))
        return PrunedSizes(model.config, shape, tuple(layers), key_heads)

    @property
    def widest(self) -> Widths:
        """The largest number of everything."""
        return Widths(*(max(numbers) for numbers in zip(*self.layers, strict=True)))

    @property
    def uniform(self) -> bool:
        """Whether all layers that have a block have the same number of its units."""
        return all({most, 0} >= set(numbers) for most, *numbers in zip(self.widest, *self.layers, strict=True))

    @property
    def alike(self) -> "PrunedSizes":
        """The same for layers that are built alike: if one gives its query heads keys of their own, all do."""
        if not self.key_heads:
            return self
        every = torch.arange(self.shape.num_heads) // self.shape.queries_per_key
        key_heads = {i: self.key_heads.get(i, every) for i, widths in enumerate(self.layers) if widths.heads}
        layers = tuple(widths._replace(groups=widths.heads) for widths in self.layers)
        return replace(self, layers=layers, key_heads=key_heads)


def check_exportable(model: PreTrainedModel) -> str:
    """Refuse what no exporter of ours writes; returns the name of the model's class in transformers."""
    check_whole(model, "an export")
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None)
    if kind is None or not isinstance(model, kind):
        raise UserError(
            f"{type(model).__name__} cannot be exported: only causal language models of transformers can, loaded by "
            "AutoModelForCausalLM"
        )
    return str(kind.__name__)


def flops_of(shape: ModelShape, layers: tuple[Widths, ...], tokens: int) -> int:
    """FLOPs of one row in a model with these widths, vocabulary projection included."""
    attention = sum(attention_flops(shape, 1, tokens, w.heads, w.groups) for w in layers if w.heads)
    dense = dense_flops(shape, 1, tokens)
    mlps = sum(mlp_flops(shape, 1, tokens, w.channels) for w in layers)
    return attention + mlps + dense.other + dense.outer + dense.vocabulary


def _key_heads(model: PreTrainedModel) -> dict[int, Tensor]:
    """Of a single key/value head, all query heads can share it as before: none is given its own."""
    if not is_pruned(model):
        return {}
    pruning = pruning_of(model)
    shape = pruning.shape
    if pruning.plan.unit is not AttentionUnit.QUERY_HEAD or not 1 < shape.num_key_value_heads < shape.num_heads:
        return {}
    return {
        layer: kept.cpu() // shape.queries_per_key
        for (layer, block), kept in pruning.choices.items()
        if block is Block.ATTENTION and len(kept) < shape.num_heads
    }
