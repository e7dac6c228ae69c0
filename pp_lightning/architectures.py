"""Architectures as data: where each model family keeps the parts that pruning touches.

A new family is one :class:`Architecture` here and one row in ``tests/models.py``. Names are attribute paths: of modules
inside a decoder layer, of the decoder inside the model, and of fields in the config.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from pp_lightning.errors import UserError


@dataclass(frozen=True)
class Refusal:
    """A config field whose value makes a model unsupported, and why."""

    field: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Architecture:
    """One family of pre-norm decoders.

    Attributes:
        name: for messages.
        model_types: values of ``config.model_type`` that it describes.
        decoder: path of the module that loops over the layers, inside the causal language model.
        layers: name of the layer list inside the decoder.
        attention_norm, query, key, value, attention_output: modules of the attention block, inside a layer.
        query_norm, key_norm: per-head norms, used where a layer has them.
        attention: the module that computes attention; it has ``head_dim`` and ``scaling``.
        head_count: attribute of ``attention`` that fixes the number of heads, None where the weights' shapes decide.
        mlp_norm, up, down, activation: modules of the MLP block, inside a layer.
        gate: the gating projection; None for an MLP without one.
        mlp_width: config field with the MLP width F.
        rotary: whether queries and keys are rotated with the decoder's ``position_embeddings``.
        refusals: configurations of these model types that do not have this structure.
    """

    name: str
    model_types: tuple[str, ...]
    decoder: str
    attention_norm: str
    attention_output: str
    mlp_norm: str
    up: str
    down: str
    activation: str
    gate: str | None
    mlp_width: str
    rotary: bool
    head_count: str | None = None
    layers: str = "layers"
    attention: str = "self_attn"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    refusals: tuple[Refusal, ...] = ()

    def decoder_of(self, model: PreTrainedModel) -> nn.Module:
        """The module that loops over the layers."""
        decoder: nn.Module = model.get_submodule(self.decoder)
        return decoder

    def layers_of(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        """The decoder layers, first to last."""
        layers = getattr(self.decoder_of(model), self.layers)
        assert isinstance(layers, nn.ModuleList)
        return list(layers)


LLAMA = Architecture(
    name="LLaMA",
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    decoder="model",
    attention_norm="input_layernorm",
    attention_output="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    activation="mlp.act_fn",
    mlp_width="intermediate_size",
    rotary=True,
)

OPT = Architecture(
    name="OPT",
    model_types=("opt",),
    decoder="model.decoder",
    attention_norm="self_attn_layer_norm",
    attention_output="self_attn.out_proj",
    head_count="num_heads",
    mlp_norm="final_layer_norm",
    gate=None,
    up="fc1",
    down="fc2",
    activation="activation_fn",
    mlp_width="ffn_dim",
    rotary=False,
    refusals=(
        Refusal(
            "do_layer_norm_before",
            False,
            "it normalises after each block, as OPT-350m does, and a probe is taken before the norm",
        ),
    ),
)

ARCHITECTURES = (LLAMA, OPT)


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The description of a model's family.

    Raises:
        UserError: the model type is not known, or this configuration of it is not supported.
    """
    for architecture in ARCHITECTURES:
        if config.model_type in architecture.model_types:
            for refusal in architecture.refusals:
                if getattr(config, refusal.field, None) == refusal.value:
                    raise UserError(f"this {architecture.name} model cannot be pruned: {refusal.reason}")
            return architecture
    known = ", ".join(sorted(t for a in ARCHITECTURES for t in a.model_types))
    raise UserError(f"model type {config.model_type!r} is not supported; known types: {known}")


@dataclass(frozen=True)
class ModelShape:
    """The sizes that pruning and FLOPs depend on.

    Attributes:
        num_layers: L.
        hidden_size: D.
        num_heads: H, query heads.
        num_key_value_heads: G.
        head_size: d.
        mlp_width: F.
        gated: whether the MLP has a gate beside its up projection.
        vocabulary: rows of the output projection.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    head_size: int
    mlp_width: int
    gated: bool
    vocabulary: int

    @property
    def grouped(self) -> bool:
        """Whether query heads share key/value heads."""
        return self.num_key_value_heads < self.num_heads


def shape_of(config: PreTrainedConfig) -> ModelShape:
    """The sizes of a model, from its config alone."""
    architecture = architecture_of(config)
    heads = config.num_attention_heads
    return ModelShape(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        mlp_width=getattr(config, architecture.mlp_width),
        gated=architecture.gate is not None,
        vocabulary=config.vocab_size,
    )
