"""How llama.cpp names, orders and describes what an export holds: pure data, no file and no package."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from pp_lightning.errors import UserError
from pp_lightning.export.entries import Entry, tensors_of
from pp_lightning.export.gguf_families import ARCHITECTURES, Architecture
from pp_lightning.export.layouts import Target
from pp_lightning.export.sizes import Widths
from pp_lightning.export.stock import has_windows
from pp_lightning.families import shape_of

# Types whose arithmetic is LLaMA's once fused projections are taken apart; llama.cpp's ``llama`` and ``deci`` hold it.
LLAMA_LIKE = {"llama", "mistral", "qwen2", "seed_oss", "phi3"}
KNOWN = LLAMA_LIKE | ARCHITECTURES.keys()

_LLAMA = Architecture("llama", interleaves=True, reads_biases=True)

_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_INNER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file, made from a tensor as it stands or from an entry of the export.

    Attributes:
        rows: first row and number of rows of the source; None takes all.
        interleave: heads whose two halves of rows are interleaved, as llama.cpp rotates them; 0 leaves the order.
        plus: added to every number.
    """

    name: str
    source: Entry | Tensor
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None
    interleave: int = 0
    plus: float = 0.0

    def make(self) -> Tensor:
        """The tensor, on the CPU and contiguous, in the dtype of its source."""
        tensor = self.source.make() if isinstance(self.source, Entry) else self.source
        if self.rows is not None:
            tensor = tensor.narrow(0, *self.rows)
        if self.interleave:
            halves = tensor.reshape(self.interleave, 2, -1, *tensor.shape[1:])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        return (tensor + self.plus if self.plus else tensor).contiguous()


@dataclass(frozen=True)
class GgufPlan:
    """What the file will say and hold."""

    architecture: str
    fields: Mapping[str, int | float | str | Sequence[int]]
    tensors: Sequence[GgufTensor]


def check_family(config: PreTrainedConfig, layout: str) -> None:
    """Refuse what llama.cpp cannot compute, from the config alone."""
    kind = config.model_type
    if kind not in KNOWN:
        raise UserError(
            f"no GGUF is written of model type {kind!r} (but of {', '.join(sorted(KNOWN))}): use --format safetensors "
            "or onnx, or --for vllm, openvino or onnxruntime-genai"
        )
    own = ARCHITECTURES.get(kind, _LLAMA)
    if own is not _LLAMA and layout == "per-layer":
        raise UserError(
            f"llama.cpp's {own.name} has the same counts in every layer: use --layout uniform or padded, or --for vllm"
        )
    if own.ties_embeddings and not config.tie_word_embeddings:
        raise UserError(f"llama.cpp's {own.name} has no vocabulary projection of its own: use --format safetensors")
    own.fields(config)
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    if has_windows(config) and not own.has_windows and window < config.max_position_embeddings:
        raise UserError(f"llama.cpp's {own.name} has no sliding windows: use --format safetensors or onnx")
    if kind in LLAMA_LIKE and config.hidden_act not in ("silu", "swish"):
        raise UserError(f"llama.cpp's llama has no activation {config.hidden_act!r}: use --format safetensors or onnx")
    rope = _rope(config)
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3"):
        raise UserError(
            f"rotary positions of type {rope['rope_type']!r} go into no GGUF here: use --format safetensors"
        )
    if float(rope.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UserError("llama.cpp's llama rotates whole heads, this model a part of them: use --format safetensors")


def check_biases(model: PreTrainedModel, *, more: bool = False) -> None:
    """Refuse biases that llama.cpp does not read: only its ``llama`` and ``deci`` have those of outputs and MLPs.

    ``more`` says whether pruning is going to add some to outputs.
    """
    own = ARCHITECTURES.get(model.config.model_type, _LLAMA)
    inputs = ("q_proj.bias", "k_proj.bias", "v_proj.bias")
    biased = [name for name in tensors_of(model) if name.endswith(".bias") and not name.endswith(inputs)]
    if not own.reads_biases and (biased or more):
        raise UserError(
            f"llama.cpp's {own.name} reads no biases of output projections: choose a method that has none (WandaSP, "
            "FLAP with --model.method.bias false), or use --for vllm, onnxruntime-genai or openvino"
        )


def plan_for(model: PreTrainedModel, target: Target) -> GgufPlan:
    """Names, order and description of what a target holds."""
    config = model.config
    check_family(config, target.layout)
    alike = len(set(target.layers)) == 1
    own = ARCHITECTURES.get(config.model_type, _LLAMA)
    architecture = "deci" if own is _LLAMA and not alike else own.name
    if not all(all(widths) for widths in target.layers):
        raise UserError("a layer without heads or channels goes into no GGUF: use --format safetensors")
    tensors = [tensor for entry in target.entries for tensor in _renamed(entry, target.layers, own)]
    return GgufPlan(
        architecture, _fields(model, target.layers, alike) | own.fields(config), [*_rope_factors(config), *tensors]
    )


def _renamed(entry: Entry, layers: Sequence[Widths], own: Architecture) -> Iterator[GgufTensor]:
    """An entry under llama.cpp's name; a fused projection as its parts."""
    path, _, kind = entry.name.rpartition(".")
    plus, names = own.plus if path.endswith("norm") else 0.0, {**_INNER, **own.names}
    if path in _OUTER:
        yield GgufTensor(f"{_OUTER[path]}.{kind}", entry, entry.shape, plus=plus)
        return
    number, _, inner = path.removeprefix("model.layers.").partition(".")
    if inner not in names and inner not in _FUSED:
        raise UserError(f"llama.cpp has no place for the weight {entry.name}: use --format safetensors or onnx")
    widths, start = layers[int(number)], 0
    for part in _FUSED.get(inner, (inner,)):
        heads = {"self_attn.q_proj": widths.heads, "self_attn.k_proj": widths.groups}.get(part, 0)
        rotated = heads if own.interleaves else 0
        whole = GgufTensor(f"blk.{number}.{names[part]}.{kind}", entry, entry.shape, interleave=rotated, plus=plus)
        if inner not in _FUSED:
            yield whole
            return
        size = _part_rows(part, widths, entry.shape[0])
        yield replace(whole, shape=(size, *entry.shape[1:]), rows=(start, size))
        start += size


def _part_rows(part: str, widths: Widths, rows: int) -> int:
    if part.startswith("mlp"):
        return widths.channels
    units = widths.heads if part.endswith("q_proj") else widths.groups
    return units * (rows // (widths.heads + 2 * widths.groups))


def _fields(model: PreTrainedModel, layers: Sequence[Widths], alike: bool) -> dict[str, Any]:
    config, rope = model.config, _rope(model.config)
    counts: Widths | tuple[list[int], ...] = layers[0] if alike else tuple(map(list, zip(*layers, strict=True)))
    heads, groups, channels = counts
    size = shape_of(config).head_size
    fields = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": len(layers),
        "feed_forward_length": channels,
        "attention.head_count": heads,
        "attention.head_count_kv": groups,
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": size,
        "rope.freq_base": float(rope.get("rope_theta") or 10000.0),
    }
    if rope.get("rope_type") == "linear":
        fields |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    return fields


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    rope = dict(getattr(config, "rope_parameters", None) or {})
    return rope.get("full_attention", rope)  # of windows, where they have another, its architecture asks


def _rope_factors(config: PreTrainedConfig) -> Iterator[GgufTensor]:
    """By what LLaMA 3's scaling divides each frequency: long waves by its factor, short ones by 1, a ramp between."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return
    size, context = shape_of(config).head_size, rope["original_max_position_embeddings"]
    frequencies = rope["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    turns = context * frequencies / (2 * math.pi)  # of a wave within the context that the model was trained on first
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    ramp = ((turns - low) / (high - low)).clamp(0, 1)
    factors = (1 / ((1 - ramp) / factor + ramp)).float()
    yield GgufTensor("rope_freqs.weight", factors, tuple(factors.shape))
