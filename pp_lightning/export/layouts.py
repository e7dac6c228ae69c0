"""The ways to write a pruned model's widths: the same in every layer, padded to the widest, or each its own."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from transformers import PreTrainedConfig, PreTrainedModel

from pp_lightning.blocks import Block
from pp_lightning.errors import UserError
from pp_lightning.export.entries import Entry, biases_to_come, entries_of, held_by, tensors_of
from pp_lightning.export.sizes import PrunedSizes, Widths, check_exportable
from pp_lightning.export.stock import count_fields, stock_models
from pp_lightning.families import blocks_of, empty_model, layer_prefix

Layout = Literal["uniform", "per-layer", "padded"]
BUNDLED = "modeling_pruned"  # the modelling file of a per-layer folder, without .py

# Which engine besides was seen to load a folder of a class and to compute the same (docs/engines.md).
_SEEN_IN = {
    **dict.fromkeys(("llama", "mistral", "qwen3", "gemma", "opt", "phi3"), ", vLLM"),
    **dict.fromkeys(("qwen2", "seed_oss"), ", vLLM with --model-impl transformers"),
}

# Fields that every config has, that say nothing about a causal language model, or where it lay on somebody's disk.
_UNTOLD = {
    *("_name_or_path", "chunk_size_feed_forward", "id2label", "is_encoder_decoder", "label2id"),
    *("output_attentions", "output_hidden_states", "problem_type", "return_dict"),
}


@dataclass(frozen=True)
class Target:
    """What is going to be written.

    Attributes:
        config: content of ``config.json``.
        model_class: name of the class that loads it.
        layers: widths of every layer as written, padding included.
        code: the modelling file that goes with it; None where transformers' own does.
        loads_in: who can read it.
    """

    layout: Layout
    config: Mapping[str, Any]
    model_class: str
    layers: tuple[Widths, ...]
    entries: Sequence[Entry]
    code: str | None
    loads_in: str


def target_for(layout: Layout, model: PreTrainedModel) -> Target:
    """How a statically pruned model is written in a layout.

    Raises:
        UserError: the layout cannot hold it, or no layout can.
    """
    return LAYOUTS[layout](model, PrunedSizes.of(model))


def check_layout(layout: Layout, model: PreTrainedModel, biased: Collection[Block]) -> None:
    """Refuse, before a model is pruned, biases that no stock class holds.

    ``biased`` are the blocks whose outputs the method gives biases.
    """
    if layout != "per-layer" and biased:
        _stock(layout, model, PrunedSizes.of(model).alike, biases_to_come(model, biased))


def _uniform(model: PreTrainedModel, sizes: PrunedSizes) -> Target:
    if not sizes.alike.uniform:
        raise UserError("layers keep different numbers of units: use --layout per-layer or --layout padded")
    return _stock("uniform", model, sizes.alike)


def _stock(layout: Layout, model: PreTrainedModel, sizes: PrunedSizes, more: Sequence[Entry] = ()) -> Target:
    own, widths = [*entries_of(model, sizes), *more], sizes.widest
    for holder in stock_models(sizes, widths, {entry.name for entry in own}):
        entries = held_by(holder, own)
        if entries is not None:
            model_class = type(holder).__name__
            return Target(
                layout=layout,
                config=config_content(holder.config) | {"architectures": [model_class]},
                model_class=model_class,
                layers=PrunedSizes.of(holder).layers,
                entries=entries,
                code=None,
                loads_in=f"transformers{_SEEN_IN.get(holder.config.model_type, '')}",
            )
    biases = sorted({entry.name.split(".")[-2] for entry in own if entry.own and entry.name.endswith(".bias")})
    numbers = f"a model of type {sizes.config.model_type} with {widths.heads} heads and {widths.channels} channels"
    with_biases = f" and biases in {', '.join(biases)}" if biases else ""
    raise UserError(f"no stock class holds {numbers}{with_biases}: use --layout per-layer")


def _per_layer(model: PreTrainedModel, sizes: PrunedSizes) -> Target:
    stock, entries = check_exportable(model), entries_of(model, sizes)
    dense = empty_model(sizes.config)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(dense).items()}
    fields = config_content(sizes.config)
    per_layer = {str(index): count_fields(fields, sizes, widths) for index, widths in enumerate(sizes.layers)}
    sizes_of_heads = [one.pop("head_dim") for one in per_layer.values() if "head_dim" in one]
    head_size = {"head_dim": sizes_of_heads[0]} if sizes_of_heads else {}
    content = (
        fields
        | head_size
        | {
            "architectures": ["PrunedForCausalLM"],
            "auto_map": {
                "AutoConfig": f"{BUNDLED}.PrunedConfig",
                "AutoModel": f"{BUNDLED}.PrunedModel",
                "AutoModelForCausalLM": f"{BUNDLED}.PrunedForCausalLM",
            },
            "per_layer_config": per_layer,
            "allow_global_per_layer_attribute_access": True,
            "pruned_shapes": {e.name: list(e.shape) for e in entries if e.shape != shapes.get(e.name)},
            "pruned_counts": _counts(dense, sizes),
        }
    )
    code = files("pp_lightning.export.bundled").joinpath("per_layer.py").read_text(encoding="utf-8")
    base = type(model.base_model).__name__
    return Target(
        layout="per-layer",
        config=content,
        model_class=f"PrunedForCausalLM ({stock})",
        layers=sizes.layers,
        entries=entries,
        code=code.replace("LlamaConfig", type(sizes.config).__name__)
        .replace("LlamaForCausalLM", stock)
        .replace("LlamaModel", base),
        loads_in="transformers with trust_remote_code=True, vLLM with --trust-remote-code",
    )


def _counts(dense: PreTrainedModel, sizes: PrunedSizes) -> dict[str, int]:
    """What attention modules know of their numbers of heads, where that changes, by path."""
    found = {}
    for (index, which), block in blocks_of(dense).items():
        if which is Block.ATTENTION:
            widths, family = sizes.layers[index], block.family
            wanted = {
                **dict.fromkeys(family.query_counts, widths.heads),
                **dict.fromkeys(family.key_counts, widths.groups),
                "num_key_value_groups": widths.heads // widths.groups,
            }
            for name, number in wanted.items():
                before: Any = block.module
                for part in name.split("."):
                    before = getattr(before, part, None)
                if before not in (None, number):
                    found[f"{layer_prefix(dense, index)}.{block.path_of(name)}"] = number
    return found


def config_content(config: PreTrainedConfig) -> dict[str, Any]:
    """Every field of a config that matters, defaults included: they may change from version to version.

    ``rope_theta`` and ``rope_scaling`` stand at the top level too: transformers 4 and engines read them there, and
    silently take 10000 where there is none.
    """
    content = {name: value for name, value in config.to_dict().items() if name not in _UNTOLD}
    rope = content.get("rope_parameters") or {}
    if "rope_theta" in rope:
        content["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            content["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    return content


LAYOUTS: Mapping[Layout, Callable[[PreTrainedModel, PrunedSizes], Target]] = {
    "uniform": _uniform,
    "per-layer": _per_layer,
    "padded": lambda model, sizes: _stock("padded", model, sizes.alike),
}
