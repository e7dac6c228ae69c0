"""What a pruned model is made of: the width of every layer's blocks, and which projections have a bias.

Read off the weights' shapes, so that every static method exports alike, whatever chose the units.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from pp_lightning.architectures import Architecture, ModelShape, architecture_of, shape_of
from pp_lightning.errors import UserError
from pp_lightning.flops import attention_flops, mlp_flops
from pp_lightning.pruning import pruners_of

# The projections of a layer, by the field of Architecture that holds their path.
INPUTS = ("query", "key", "value", "gate", "up")
OUTPUTS = ("attention_output", "down")


@dataclass(frozen=True)
class Widths:
    """Units of one layer.

    Attributes:
        heads: query heads.
        groups: key/value heads.
        channels: MLP channels.
    """

    heads: int
    groups: int
    channels: int

    def of(self, role: str, head_size: int) -> int:
        """Rows of an input projection, or columns of an output projection."""
        if role in ("query", "attention_output"):
            return self.heads * head_size
        return self.groups * head_size if role in ("key", "value") else self.channels

    def widest(self, other: "Widths") -> "Widths":
        """The larger of both in everything."""
        return Widths(max(self.heads, other.heads), max(self.groups, other.groups), max(self.channels, other.channels))


@dataclass(frozen=True)
class PrunedSizes:
    """The sizes of a statically pruned model.

    Attributes:
        config: the model's own, which still has the dense sizes.
        architecture: its family.
        shape: the dense sizes.
        layers: the widths of every layer.
        biases: projections that have a bias in at least one layer, by role.
    """

    config: PreTrainedConfig
    architecture: Architecture
    shape: ModelShape
    layers: tuple[Widths, ...]
    biases: frozenset[str]

    @staticmethod
    def of(model: PreTrainedModel) -> "PrunedSizes":
        """Read the sizes of a model; a dense one has the same widths everywhere.

        Raises:
            UserError: the model is pruned per batch, so that no narrower weights exist.
        """
        architecture, shape = architecture_of(model.config), shape_of(model.config)
        if pruners_of(model):
            raise UserError("a choice per batch fits no checkpoint: freeze it first, or export the graph (onnx, pt2)")
        layers = architecture.layers_of(model)
        widths = tuple(_widths(layer, architecture, shape.head_size) for layer in layers)
        biases = {role for layer in layers for role, module in projections(layer, architecture) if _has_bias(module)}
        return PrunedSizes(model.config, architecture, shape, widths, frozenset(biases))

    @property
    def uniform(self) -> bool:
        """Whether all layers have the same widths."""
        return len(set(self.layers)) == 1

    @property
    def windows(self) -> bool:
        """Whether any layer attends a sliding window only."""
        kinds = getattr(self.config, "layer_types", None)
        if kinds is not None:
            return any(kind != "full_attention" for kind in kinds)
        return getattr(self.config, "sliding_window", None) is not None


def projections(layer: nn.Module, architecture: Architecture) -> Iterator[tuple[str, nn.Linear]]:
    """The projections of a layer, by role."""
    for role in (*INPUTS, *OUTPUTS):
        path = getattr(architecture, role)
        if path is not None:
            module = layer.get_submodule(path)
            assert isinstance(module, nn.Linear), f"{path} is a {type(module).__name__}, expected a Linear"
            yield role, module


def flops_of(shape: ModelShape, layers: tuple[Widths, ...], rows: int, tokens: int) -> int:
    """FLOPs of a (B, S) batch in a model with these widths, vocabulary projection included."""
    blocks = sum(
        attention_flops(shape, rows, tokens, w.heads, w.groups) + mlp_flops(shape, rows, tokens, w.channels)
        for w in layers
    )
    return blocks + 2 * rows * tokens * shape.hidden_size * shape.vocabulary


def _widths(layer: nn.Module, architecture: Architecture, head_size: int) -> Widths:
    found = dict(projections(layer, architecture))
    return Widths(
        found["query"].out_features // head_size, found["key"].out_features // head_size, found["up"].out_features
    )


def _has_bias(module: nn.Linear) -> bool:
    return module.bias is not None
