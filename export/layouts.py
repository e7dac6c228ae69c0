"""The ways to write a pruned model's widths: the same in every layer, padded to the widest, or each its own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from importlib.resources import files
from typing import Any, Literal

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from export.sizes import PrunedSizes, Widths
from export.stock import stock_class_for, stock_config
from pp_lightning.errors import UserError

Layout = Literal["uniform", "per-layer", "padded"]
BUNDLED = "modeling_pruned"  # the modelling file of a per-layer folder, without .py

# Fields that every config has, that say nothing about a causal language model, or where it lay on somebody's disk.
_UNTOLD = {
    "_name_or_path",
    "chunk_size_feed_forward",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
}


@dataclass(frozen=True)
class Target:
    """What is going to be written.

    Attributes:
        layout: its name.
        config: content of ``config.json``.
        model_class: name of the class that loads it.
        layers: widths of every layer as written, padding included.
        biases: projections written with a bias in every layer, by role.
        code: the modelling file that goes with it; None where transformers' own does.
        loads_in: who can read it.
    """

    layout: Layout
    config: Mapping[str, Any]
    model_class: str
    layers: tuple[Widths, ...]
    biases: frozenset[str]
    code: str | None
    loads_in: str


def target_for(layout: Layout, sizes: PrunedSizes) -> Target:
    """How a model with these sizes is written in a layout.

    Raises:
        UserError: the layout cannot hold it.
    """
    return LAYOUTS[layout](sizes)


def _uniform(sizes: PrunedSizes) -> Target:
    if not sizes.uniform:
        raise UserError("layers keep different numbers of units: use --layout per-layer or --layout padded")
    return _stock("uniform", sizes, sizes.layers[0])


def _padded(sizes: PrunedSizes) -> Target:
    return _stock("padded", sizes, reduce(Widths.widest, sizes.layers))


def _stock(layout: Layout, sizes: PrunedSizes, widths: Widths) -> Target:
    stock = stock_class_for(sizes, widths)
    if stock.heads_fill_hidden:
        heads = sizes.shape.num_heads
        widths = Widths(heads, heads, widths.channels)
    config = stock_config(stock, sizes, widths)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__
    return Target(
        layout=layout,
        config=_content(config) | {"architectures": [model_class]},
        model_class=model_class,
        layers=(widths,) * len(sizes.layers),
        biases=stock.biased(sizes.biases),
        code=None,
        loads_in=f"transformers{stock.loads_in}",
    )


def _per_layer(sizes: PrunedSizes) -> Target:
    config, architecture = sizes.config, sizes.architecture
    stock = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__
    overrides = {
        str(index): {
            "num_attention_heads": widths.heads,
            **({"num_key_value_heads": widths.groups} if architecture.rotary else {}),
            architecture.mlp_width: widths.channels,
        }
        for index, widths in enumerate(sizes.layers)
    }
    content = _content(config) | {
        "architectures": ["PrunedForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{BUNDLED}.PrunedConfig",
            "AutoModelForCausalLM": f"{BUNDLED}.PrunedForCausalLM",
        },
        "per_layer_config": overrides,
        "projection_biases": sorted(getattr(architecture, role) for role in sizes.biases),
    }
    if architecture.rotary:
        content["head_dim"] = sizes.shape.head_size
    return Target(
        layout="per-layer",
        config=content,
        model_class=f"PrunedForCausalLM ({stock})",
        layers=sizes.layers,
        biases=sizes.biases,
        code=_bundled_code(sizes, type(config).__name__, stock),
        loads_in="transformers with trust_remote_code=True",
    )


def _content(config: PreTrainedConfig) -> dict[str, Any]:
    """Every field of a config that matters, defaults included: they may change from version to version."""
    return {name: value for name, value in config.to_dict().items() if name not in _UNTOLD}


def _bundled_code(sizes: PrunedSizes, config_class: str, model_class: str) -> str:
    name = "rotary" if sizes.architecture.rotary else "opt"
    template = files("export.bundled").joinpath(f"{name}.py").read_text(encoding="utf-8")
    return template.replace("LlamaConfig", config_class).replace("LlamaForCausalLM", model_class)


LAYOUTS: Mapping[Layout, Callable[[PrunedSizes], Target]] = {
    "uniform": _uniform,
    "per-layer": _per_layer,
    "padded": _padded,
}
