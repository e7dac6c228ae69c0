"""Which stock transformers class holds a pruned model's weights as they are."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from export.sizes import PrunedSizes, Widths
from pp_lightning.errors import UserError

_QUERY_KEY_VALUE = frozenset({"query", "key", "value"})
_ATTENTION = _QUERY_KEY_VALUE | {"attention_output"}
_MLP = frozenset({"gate", "up", "down"})

# What configs of all LLaMA-like classes call the same.
_SHARED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "rope_parameters",
    "tie_word_embeddings",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


@dataclass(frozen=True)
class StockClass:
    """One model type of transformers, and what it can hold.

    Attributes:
        model_type: its name in transformers.
        loads_in: who reads it beside transformers, as an addition to that word.
        biases: projections that get a bias where a config field is set, by that field.
        fixed_biases: projections that always have one.
        head_norms: it normalises queries and keys.
        heads_divide_hidden: it wants a number of heads that divides the hidden size.
        heads_fill_hidden: its heads together are always as wide as the hidden size.
        settings: further config fields, set where the weights come from another class.
    """

    model_type: str
    loads_in: str
    biases: Mapping[str, frozenset[str]] = field(default_factory=dict)
    fixed_biases: frozenset[str] = frozenset()
    head_norms: bool = False
    heads_divide_hidden: bool = False
    heads_fill_hidden: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    def bias_fields(self, needed: frozenset[str]) -> dict[str, bool]:
        """Config fields that give the needed projections a bias."""
        wanted = needed - self.fixed_biases
        return {name: bool(roles & wanted) for name, roles in self.biases.items()}

    def biased(self, needed: frozenset[str]) -> frozenset[str]:
        """Projections that have a bias when the needed ones do."""
        chosen = [self.biases[name] for name, wanted in self.bias_fields(needed).items() if wanted]
        return self.fixed_biases.union(*chosen)


_READ_ABOUT = "; by reading only: vLLM, llama.cpp, onnxruntime-genai"
STOCK_CLASSES = (
    StockClass(
        "llama",
        _READ_ABOUT,
        biases={"attention_bias": _ATTENTION, "mlp_bias": _MLP},
        heads_divide_hidden=True,
    ),
    StockClass("mistral", _READ_ABOUT, settings={"sliding_window": None}),
    StockClass("qwen2", "", fixed_biases=_QUERY_KEY_VALUE),
    StockClass("qwen3", "; by reading only: vLLM, llama.cpp", biases={"attention_bias": _ATTENTION}, head_norms=True),
    StockClass(
        "seed_oss",
        "; by reading only: vLLM with --model-impl transformers",
        biases={"attention_bias": _QUERY_KEY_VALUE, "attention_out_bias": frozenset({"attention_output"})}
        | {"mlp_bias": _MLP},
        settings={"residual_dropout": 0.0},
    ),
    StockClass(
        "opt", "; by reading only: vLLM", biases={"enable_bias": _ATTENTION | {"up", "down"}}, heads_fill_hidden=True
    ),
)


def stock_class_for(sizes: PrunedSizes, widths: Widths) -> StockClass:
    """The class that holds these widths in every layer: the model's own if it can, else the first that computes alike.

    Raises:
        UserError: no stock class can.
    """
    own = next(stock for stock in STOCK_CLASSES if stock.model_type == sizes.config.model_type)
    # Only the own class is known to read a sliding window the same way; OPT computes unlike all others.
    others = (
        [] if sizes.windows or not sizes.architecture.rotary else [s for s in STOCK_CLASSES if _computes_like(s, own)]
    )
    for stock in [own, *others]:
        if _holds(stock, sizes, widths):
            return stock
    raise UserError(f"no stock class holds {_peculiarities(sizes, widths)}: use --layout per-layer")


def stock_config(stock: StockClass, sizes: PrunedSizes, widths: Widths) -> PreTrainedConfig:
    """The config of a model with these widths in every layer."""
    config = sizes.config
    own = stock.model_type == config.model_type
    kept = config.to_dict()
    if not own:
        kept = {name: kept[name] for name in _SHARED} | dict(stock.settings)
    kept |= {sizes.architecture.mlp_width: widths.channels, **stock.bias_fields(sizes.biases)}
    if not stock.heads_fill_hidden:
        kept |= {"num_attention_heads": widths.heads, "num_key_value_heads": widths.groups}
        kept["head_dim"] = sizes.shape.head_size
    kept.pop("model_type", None)
    made: PreTrainedConfig = AutoConfig.for_model(stock.model_type, **kept)
    return made


def _computes_like(stock: StockClass, own: StockClass) -> bool:
    return not stock.heads_fill_hidden and stock.head_norms == own.head_norms


def _holds(stock: StockClass, sizes: PrunedSizes, widths: Widths) -> bool:
    if stock.heads_divide_hidden and sizes.shape.hidden_size % widths.heads:
        return False
    if widths.heads % widths.groups:  # the classes do not check this themselves
        return False
    return sizes.biases <= stock.biased(sizes.biases)


def _peculiarities(sizes: PrunedSizes, widths: Widths) -> str:
    parts = [f"a {sizes.config.model_type} model with {widths.heads} heads"]
    if sizes.biases:
        parts.append(f"biases in {', '.join(sorted(sizes.biases))}")
    if sizes.windows:
        parts.append("sliding windows")
    return " and ".join(parts)
