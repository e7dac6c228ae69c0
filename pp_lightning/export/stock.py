"""Which stock transformers class holds a pruned model's weights as they are, found by building it without memory."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from pp_lightning.export.entries import tensors_of
from pp_lightning.export.sizes import PrunedSizes, Widths
from pp_lightning.families import empty_model, shape_of_model

# Classes that compute alike if their weights have the same names, and the fields that make them do so.
_LLAMA_LIKE: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "seed_oss": {"residual_dropout": 0.0},
}

# What their configs call the same.
_SHARED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("use_cache", "rope_parameters", "tie_word_embeddings", "attention_dropout"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)

_MLP_WIDTHS = ("intermediate_size", "intermediate_size_mlp", "ffn_dim", "ffn_hidden_size")


def stock_models(sizes: PrunedSizes, widths: Widths, names: set[str]) -> Iterator[PreTrainedModel]:
    """Models without memory that compute what the pruned one does if they can hold its weights, the best first.

    The model's own class; another one that computes alike; the own one with as many heads as before pruning, for
    classes whose heads are together as wide as the hidden size.
    """
    kind, fields = type(sizes.config), sizes.config.to_dict()
    yield from _holding(kind, fields, sizes, widths, names)
    if sizes.config.model_type in _LLAMA_LIKE and not has_windows(sizes.config):
        for model_type, settings in _LLAMA_LIKE.items():
            other = type(AutoConfig.for_model(model_type))
            without_biases = {name: False for name, value in other().to_dict().items() if _is_bias(name, value)}
            shared = {name: fields[name] for name in _SHARED}
            yield from _holding(other, {**without_biases, "head_dim": None, **shared, **settings}, sizes, widths, names)
    if 0 < widths.heads < sizes.shape.num_heads:
        heads = sizes.shape.num_heads
        dense = Widths(heads, heads * widths.groups // widths.heads, widths.channels)
        yield from _holding(kind, fields, sizes, dense, names)


def _holding(
    kind: type[PreTrainedConfig], fields: Mapping[str, Any], sizes: PrunedSizes, widths: Widths, names: set[str]
) -> Iterator[PreTrainedModel]:
    """The class with these widths, and with the biases that are needed, if it can be built so."""
    counted = {**fields, **count_fields(fields, sizes, widths)}
    model = _built(kind, counted)
    for name in [name for name, value in counted.items() if _is_bias(name, value) and not value]:
        missing = set() if model is None else names - tensors_of(model).keys()
        more = _built(kind, counted | {name: True}) if missing else None
        if more is not None and missing & tensors_of(more).keys():
            model, counted = more, counted | {name: True}
    wanted = replace(sizes.shape, num_heads=widths.heads, num_key_value_heads=widths.groups, mlp_width=widths.channels)
    # how a model is made anew, where its layers have parts that are not pruned, tells its own widths
    if model is not None and replace(shape_of_model(model), unknown=None) == replace(wanted, unknown=None):
        yield model


def has_windows(config: PreTrainedConfig) -> bool:
    """Whether any layer attends a sliding window only: each class has its own way of saying so."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return any(kind not in ("full_attention", "linear_attention") for kind in kinds)
    return getattr(config, "sliding_window", None) is not None


def count_fields(fields: Mapping[str, Any], sizes: PrunedSizes, widths: Widths) -> dict[str, int]:
    """Config fields that say how many units there are, as the config calls them."""
    shape = sizes.shape
    counts = dict.fromkeys([name for name in _MLP_WIDTHS if fields.get(name) == shape.mlp_width], widths.channels)
    if widths.heads:
        heads = {"num_attention_heads": widths.heads, "num_kv_heads": widths.groups, "head_dim": shape.head_size}
        heads["num_key_value_heads"] = widths.groups
        # Classes whose config does not have it may still read it; others, which compute it, show that they do not.
        needs_size = widths.heads * shape.head_size != shape.hidden_size and not hasattr(sizes.config, "head_dim")
        counts |= {name: n for name, n in heads.items() if name in fields or (name == "head_dim" and needs_size)}
    return counts


def _built(kind: type[PreTrainedConfig], fields: Mapping[str, Any]) -> PreTrainedModel | None:
    try:
        return empty_model(kind.from_dict(dict(fields)))
    except Exception:  # whatever configs and models raise about numbers that do not suit them
        return None


def _is_bias(name: str, value: Any) -> bool:
    return isinstance(value, bool) and "bias" in name
