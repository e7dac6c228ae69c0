"""What llama.cpp calls a model type that it has an architecture of its own for, and what that does not compute."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from pp_lightning.errors import UserError
from pp_lightning.export.stock import has_windows
from pp_lightning.families import shape_of

Fields = dict[str, Any]


def _nothing(_: PreTrainedConfig) -> Fields:
    return {}


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures, the same counts in every layer.

    Attributes:
        plus: added to the weights of norms.
        interleaves: whether rows of queries and keys are interleaved, as LLaMA's are there.
        reads_biases: of output projections and MLPs.
        has_windows: whether layers may attend a sliding window.
        ties_embeddings: whether the vocabulary projection is always the embedding.
        names: of weights that LLaMA calls otherwise, or does not have.
        fields: what the file says beside LLaMA's fields, from the config.

    ``fields`` raises UserError where the config asks for what the architecture does not compute.
    """

    name: str
    plus: float = 0.0
    interleaves: bool = False
    reads_biases: bool = False
    has_windows: bool = False
    ties_embeddings: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    fields: Callable[[PreTrainedConfig], Fields] = _nothing


def _gemma2(config: PreTrainedConfig) -> Fields:
    _check_gemma(config, "gemma2", large=46)
    caps = (config.attn_logit_softcapping, config.final_logit_softcapping)
    if None in caps:
        raise UserError("llama.cpp's gemma2 always caps scores and logits, this model does not: use --format onnx")
    return {"attn_logit_softcapping": float(caps[0]), "final_logit_softcapping": float(caps[1]), **_windows(config)}


def _gemma3(config: PreTrainedConfig) -> Fields:
    _check_gemma(config, "gemma3", large=62)
    if config.attn_logit_softcapping is not None or config.use_bidirectional_attention:
        raise UserError("llama.cpp's gemma3 caps no scores and looks back only: use --format safetensors")
    local = config.rope_parameters["sliding_attention"]
    if local.get("rope_type", "default") != "default":
        raise UserError("llama.cpp's gemma3 scales no rotary positions in windows: use --format safetensors")
    cap = config.final_logit_softcapping
    capped = {} if cap is None else {"final_logit_softcapping": float(cap)}
    return {"rope.freq_base_swa": float(local["rope_theta"]), **capped, **_windows(config)}


def _granite(config: PreTrainedConfig) -> Fields:
    if config.hidden_act not in ("silu", "swish"):
        raise UserError(f"llama.cpp's granite has no activation {config.hidden_act!r}: use --format safetensors")
    return {
        "logit_scale": float(config.logits_scaling),
        "residual_scale": float(config.residual_multiplier),
        "embedding_scale": float(config.embedding_multiplier),
        "attention.scale": float(config.attention_multiplier),
    }


def _check_gemma(config: PreTrainedConfig, name: str, large: int) -> None:
    if config.hidden_activation != "gelu_pytorch_tanh":
        raise UserError(f"llama.cpp's {name} has no activation {config.hidden_activation!r}: use --format safetensors")
    if config.query_pre_attn_scalar != shape_of(config).head_size:
        raise UserError(f"llama.cpp's {name} scales scores by the size of a head alone: use --format safetensors")
    if config.num_hidden_layers == large:
        raise UserError(
            f"llama.cpp takes {large} layers of {name} for its largest model and scales scores by its number of heads, "
            "which pruning changes: use --format safetensors"
        )


def _windows(config: PreTrainedConfig) -> Fields:
    """Which layers attend a window, and how long it is; nothing where none does."""
    if not has_windows(config):
        return {"attention.sliding_window_pattern": [False] * config.num_hidden_layers}
    kinds = [kind == "sliding_attention" for kind in config.layer_types]
    return {"attention.sliding_window": int(config.sliding_window), "attention.sliding_window_pattern": kinds}


_GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
ARCHITECTURES: Mapping[str, Architecture] = {
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma", plus=1.0, ties_embeddings=True),
    "gemma2": Architecture(
        "gemma2", plus=1.0, has_windows=True, ties_embeddings=True, names=_GEMMA_NORMS, fields=_gemma2
    ),
    "gemma3_text": Architecture("gemma3", plus=1.0, has_windows=True, names=_GEMMA_NORMS, fields=_gemma3),
    "granite": Architecture("granite", interleaves=True, reads_biases=True, fields=_granite),
}
