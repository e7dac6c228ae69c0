"""Model families as data: where a transformer keeps the parts that pruning touches, and what is particular about it.

Blocks are found by the names that transformers gives to projections, and by shape. A family that needs nothing else is
a model type in :data:`FAMILIES` at most; a :class:`Family` says what differs. Whatever is found is checked when a model
is pruned (:mod:`pp_lightning.pruned.check`).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from pp_lightning.blocks import Block, BlockKey, ModelShape
from pp_lightning.errors import UserError
from pp_lightning.functional.selection import Rows
from pp_lightning.interfaces import displaced_forward, effective_weight
from pp_lightning.parallel import Reduced, is_spread, own_part
from pp_lightning.stored import values_of

# Projections into a block by name, each with the roles of its output rows; several roles follow one another. ``group``
# is query, key and value of a head (or of a key/value group), one unit after the other.
_ATTENTION_INPUTS: tuple[Mapping[str, tuple[str, ...]], ...] = (
    {"q_proj": ("query",), "k_proj": ("key",), "v_proj": ("value",)},
    {"qkv_proj": ("query", "key", "value")},
    {"Wqkv": ("query", "key", "value")},
    {"query_key_value": ("group",)},
)
_ATTENTION_OUTPUTS = ("o_proj", "out_proj", "dense", "Wo")
_MLP_INPUTS: tuple[Mapping[str, tuple[str, ...]], ...] = (
    {"gate_proj": ("gate",), "up_proj": ("up",)},
    {"gate_up_proj": ("gate", "up")},
    {"Wi": ("gate", "up")},
    {"up_proj": ("up",)},
    {"fc1": ("up",)},
    {"c_fc": ("up",)},
    {"dense_h_to_4h": ("up",)},
)
_MLP_OUTPUTS = ("down_proj", "fc2", "c_proj", "dense_4h_to_h", "Wo")
OUTPUT = "output"  # the role of the matrix whose inputs are scored
_NO_LIMIT = 1 << 20  # tokens: more than any text here
_HEAD_SIZES = ("head_dim", "head_size", "attention_head_size")


@dataclass(frozen=True)
class Family:
    """What is particular about some model types.

    Attributes:
        model_types: values of ``config.model_type``.
        query_counts: attributes of the attention module that fix its number of query heads; ``config.NAME`` is a field
            of the module's config. Without any, the number follows from the width of the projections.
        key_counts: the same of key/value heads.
        head_parameters: paths of parameters in the attention module with one row a query head, where it has them.
        key_parameters: the same of key/value heads.
        bare_mlp: name of the activation, where a layer runs its MLP's projections without a module around them.
        linear: names of Linear subclasses that compute what a Linear does.
        stacked_if: config field; where it is set, rows of a fused ``group`` projection lie role by role after all.
        refusals: blocks that cannot be pruned wherever they are found, or are not found, and why.
        unless: config field and value: a configuration that cannot be pruned at all, and why.
    """

    model_types: tuple[str, ...]
    query_counts: tuple[str, ...] = ()
    key_counts: tuple[str, ...] = ()
    head_parameters: tuple[str, ...] = ()
    key_parameters: tuple[str, ...] = ()
    bare_mlp: str | None = None
    linear: tuple[str, ...] = ()
    stacked_if: tuple[str, Any] | None = None
    refusals: Mapping[Block, str] = field(default_factory=dict)
    unless: tuple[str, Any, str] | None = None


_ALL_HEADS = "it normalises queries and keys over all heads together"

_NOTHING_PARTICULAR = (
    *("apertus", "arcee", "clip_vision_model", "cohere2", "deit", "dinov2", "ernie4_5", "eurobert", "exaone4"),
    *("gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt_neox", "granite", "granitemoe", "helium"),
    *("hunyuan_v1_dense", "llama", "llama4_text", "ministral", "ministral3", "mistral", "mixtral", "modernbert"),
    *("nanochat", "nemotron", "olmo", "phi", "qwen2", "qwen3", "qwen3_5_text", "qwen3_moe", "qwen3_next"),
    *("seed_oss", "siglip_vision_model", "smollm3", "starcoder2", "vit"),
)

FAMILIES = (
    Family(_NOTHING_PARTICULAR),
    Family(
        ("opt",),
        query_counts=("num_heads",),
        bare_mlp="activation_fn",
        unless=("do_layer_norm_before", False, "it normalises after each block, as OPT-350m does"),
    ),
    Family(("stablelm",), query_counts=("num_heads",), key_counts=("num_key_value_heads",)),
    Family(("phi3",), query_counts=("config.num_attention_heads",), key_counts=("num_key_value_heads",)),
    Family(
        ("falcon",),
        query_counts=("num_heads",),
        key_counts=("num_kv_heads",),
        linear=("FalconLinear",),
        stacked_if=("multi_query", True),
    ),
    Family(("cohere",), head_parameters=("q_norm.weight",), key_parameters=("k_norm.weight",)),
    Family(("gpt_oss",), head_parameters=("sinks",)),
    Family(("olmo2", "olmo3"), refusals={Block.ATTENTION: _ALL_HEADS}),
    Family(("diffllama",), refusals={Block.ATTENTION: "its heads work in pairs"}),
    Family(("dinov3_vit",), refusals={Block.ATTENTION: "its rotary embedding counts patches, which a probe does not"}),
    Family(("deepseek_v2", "deepseek_v3"), refusals={Block.ATTENTION: "its heads share one latent projection"}),
)


def family_of(config: PreTrainedConfig) -> Family:
    """What is particular about a model's type; nothing where it is not known."""
    known = (family for family in FAMILIES if config.model_type in family.model_types)
    family = next(known, Family((config.model_type,)))
    if family.unless is not None:
        name, value, reason = family.unless
        if getattr(config, name, None) == value:
            raise UserError(f"this {config.model_type} model cannot be pruned: {reason}")
    return family


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a projection that play one role.

    Attributes:
        role: ``query``, ``key``, ``value``, ``group``, ``gate`` or ``up``.
        rows: how many.
    """

    role: str
    rows: int


@dataclass(frozen=True)
class BlockModules:
    """Where one block of one layer keeps its modules. Modules are looked up anew each time: adapters wrap them.

    Attributes:
        layer: the decoder (or encoder) layer.
        path: of the block's own module inside the layer; empty where the layer itself runs the projections.
        inputs: projections into the block by their name inside that module, with the roles of their rows.
        output: name of the projection that leaves the block, weight (D, C).
    """

    block: Block
    layer: nn.Module
    path: str
    inputs: Mapping[str, tuple[Part, ...]]
    output: str
    family: Family

    @property
    def module(self) -> nn.Module:
        """The module that owns the projections."""
        return self.layer.get_submodule(self.path)

    @property
    def owner(self) -> Any:
        """The module that is given what enters the block: the block's own, or a bare block's first projection."""
        return self.projection(next(iter(self.inputs))) if self.is_bare else self.module

    @property
    def names(self) -> tuple[str, ...]:
        """All projections, the output last."""
        return (*self.inputs, self.output)

    def projection(self, name: str) -> Any:
        """A projection as it is now."""
        return getattr(self.module, name)

    def path_of(self, name: str) -> str:
        """Path of a projection inside the layer."""
        return f"{self.path}.{name}" if self.path else name

    @property
    def output_weight(self) -> Tensor:
        """The matrix whose input columns are scored, (D, C)."""
        return values_of(self.projection(self.output).weight)

    @property
    def scored_weight(self) -> Tensor:
        """The matrix (D, C) that the output projection multiplies with, whatever it is made of."""
        projection = self.projection(self.output)
        return values_of(projection.weight) if self.is_linear(projection) else effective_weight(projection)

    @property
    def is_bare(self) -> bool:
        """Whether the layer itself runs the projections, without a module around them."""
        return not self.path

    @property
    def activation(self) -> Any:
        """Of a bare MLP: what is between its projections."""
        assert self.family.bare_mlp is not None
        return getattr(self.layer, self.family.bare_mlp)

    def is_linear(self, projection: nn.Module) -> bool:
        """Whether a projection computes ``x W^T + b`` of a plain weight, and nothing else."""
        known = type(projection).forward is nn.Linear.forward or type(projection).__name__ in self.family.linear
        # a parameter, not what a parametrisation or a hook makes of others for every call
        weight = projection._parameters.get("weight")
        own = type(weight) in (nn.Parameter, Tensor) or is_spread(weight)
        plain = own and weight is not None and weight.is_floating_point()
        return known and plain and isinstance(displaced_forward(projection), (type(None), Reduced))

    def is_spread(self, name: str) -> bool:
        """Whether a projection's weight is a distributed tensor."""
        return is_spread(getattr(self.projection(name), "weight", None))

    def role(self, name: str) -> str:
        """What a projection is: ``output``, or the roles of its rows."""
        return OUTPUT if name == self.output else "+".join(part.role for part in self.inputs[name])

    @property
    def is_fused(self) -> bool:
        """Whether a projection has rows of several roles."""
        return any(len(parts) > 1 or parts[0].role == "group" for parts in self.inputs.values())


@dataclass(frozen=True)
class OutputWeights(Mapping[BlockKey, Tensor]):
    """The scored matrix (D, C) of each of these blocks, made or read when it is asked for."""

    blocks: Mapping[BlockKey, BlockModules]

    def __getitem__(self, key: BlockKey) -> Tensor:
        return self.blocks[key].scored_weight

    def __iter__(self) -> Iterator[BlockKey]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)


def stack_path(model: PreTrainedModel) -> tuple[str, str]:
    """Path of the module that loops over the layers, and the name of its list of them."""
    paths, kind = list(_stacks(model, "")), model.config.model_type
    if not paths:
        raise UserError(f"model type {kind!r} has no list of transformer layers that can be pruned")
    if len(paths) > 1:
        raise UserError(
            f"this {kind} model has several stacks of layers ({', '.join(paths)}): prune a part that has one"
        )
    parent, _, name = paths[0].rpartition(".")
    return parent, name


def _stacks(module: nn.Module, prefix: str) -> Iterator[str]:
    """Paths of the lists of layers, without a look into the layers: they are most of a model."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList) and any(_looks_like_a_layer(one) for one in child):
            yield f"{prefix}{name}"
        else:
            yield from _stacks(child, f"{prefix}{name}.")


def stack_of(model: PreTrainedModel) -> nn.Module:
    """The module that loops over the layers."""
    stack: nn.Module = model.get_submodule(stack_path(model)[0])
    return stack


def layers_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The config that describes the layers: a model of images may be made from that of a larger one, with texts too."""
    found: PreTrainedConfig = getattr(stack_of(model), "config", model.config)
    return found


def layers_of(model: PreTrainedModel) -> Sequence[nn.Module]:
    """The layers, first to last."""
    parent, name = stack_path(model)
    layers = getattr(model.get_submodule(parent), name)
    assert isinstance(layers, nn.ModuleList)
    return list(layers)


def layer_prefix(model: PreTrainedModel, index: int) -> str:
    """Path of a layer inside the model."""
    return ".".join(part for part in (*stack_path(model), str(index)) if part)


def blocks_of(model: PreTrainedModel) -> dict[BlockKey, BlockModules]:
    """Every block of every layer that pruning knows, whether or not it can be pruned."""
    config = layers_config(model)
    family = family_of(config)
    found = (
        (i, block, block_of(layer, block, family, config))
        for i, layer in enumerate(layers_of(model))
        for block in Block
    )
    return {(index, block): modules for index, block, modules in found if modules is not None}


def block_of(layer: nn.Module, block: Block, family: Family, config: PreTrainedConfig) -> BlockModules | None:
    """One block of a layer; None where it has none that is known."""
    attention = block is Block.ATTENTION
    inputs, outputs = (_ATTENTION_INPUTS, _ATTENTION_OUTPUTS) if attention else (_MLP_INPUTS, _MLP_OUTPUTS)
    bare = [("", layer)] if family.bare_mlp and not attention else []
    for path, module in [*layer.named_children(), *bare]:
        roles = next((names for names in inputs if all(hasattr(module, name) for name in names)), None)
        output = next((name for name in outputs if hasattr(module, name)), None)
        if roles is None or output is None or not _are_matrices(module, (*roles, output)):
            continue
        parts = {name: _parts(module, name, own, output, family, config) for name, own in roles.items()}
        return BlockModules(block, layer, path, parts, output, family)
    return None


def unit_rows(parts: Sequence[Part], number: int, *, shared: bool) -> list[Rows]:
    """Which rows of a projection belong to units.

    ``shared`` keys and values stay whole, as single query heads of a group share them.
    """
    rows, start = [], 0
    for part in parts:
        whole = shared and part.role in ("key", "value")
        rows.append(Rows(start, part.rows, 0 if whole else part.rows // number))
        start += part.rows
    return rows


def refusal(model: PreTrainedModel, block: Block) -> str | None:
    """Why no layer's ``block`` can be pruned; None where nothing is known against it."""
    family = family_of(layers_config(model))
    if block in family.refusals or any(found is block for _, found in blocks_of(model)):
        return family.refusals.get(block)
    names = (name for layer in layers_of(model) for name, _ in layer.named_parameters())
    if block is Block.MLP and any("experts" in name for name in names):
        return "its channels are those of routed experts"
    return "its projections have no names that are known"


def _looks_like_a_layer(module: nn.Module) -> bool:
    children = [module, *module.children()]
    every = (*_ATTENTION_INPUTS, *_MLP_INPUTS)
    return any(all(hasattr(child, name) for name in names) for child in children for names in every)


def _are_matrices(module: nn.Module, names: Sequence[str]) -> bool:
    projections = [getattr(module, name) for name in names]
    return all(isinstance(one, nn.Module) and getattr(one, "weight", None) is not None for one in projections)


def _parts(
    module: nn.Module, name: str, roles: tuple[str, ...], output: str, family: Family, config: PreTrainedConfig
) -> tuple[Part, ...]:
    rows = _features(getattr(module, name))[0]
    if roles == ("group",) and family.stacked_if is not None:
        field_name, value = family.stacked_if
        if getattr(config, field_name) == value and not getattr(config, "new_decoder_architecture", False):
            roles = ("query", "key", "value")
    if len(roles) < 3:
        return tuple(Part(role, rows // len(roles)) for role in roles)
    queries = _features(getattr(module, output))[1]
    keys = (rows - queries) // 2
    return Part("query", queries), Part("key", keys), Part("value", keys)


def _features(projection: Any) -> tuple[int, int]:
    """Outputs and inputs of a projection, of a quantised one too."""
    if hasattr(projection, "out_features"):
        return projection.out_features, projection.in_features
    rows, columns = projection.weight.shape
    return rows, columns


def longest_text(config: PreTrainedConfig) -> int:
    """Tokens that a model has positions for; a large number where it sets no limit."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or _NO_LIMIT)


def head_size_of(module: nn.Module, config: PreTrainedConfig) -> int:
    """The size d of one head of an attention module."""
    found = next((getattr(module, name) for name in _HEAD_SIZES if hasattr(module, name)), None)
    found = getattr(config, "head_dim", None) if found is None else found
    return int(config.hidden_size // config.num_attention_heads if found is None else found)


def shape_of(config: PreTrainedConfig) -> ModelShape:
    """The sizes of a model, from its config alone.

    Raises:
        UserError: nothing in it can be pruned, or its layers differ in size.
    """
    return _cached_shape(Recipe.of(config))


@lru_cache(maxsize=64)
def _cached_shape(recipe: "Recipe") -> ModelShape:
    return shape_of_model(recipe())


def empty_model(config: PreTrainedConfig, kind: type[PreTrainedModel] | None = None) -> PreTrainedModel:
    """A model of this config without memory for its weights, of a class or of the one that the config stands for."""
    with torch.device("meta"):
        if kind is not None:
            return kind(config)
        try:
            return AutoModelForCausalLM.from_config(config)
        except ValueError:  # not a language model
            return AutoModel.from_config(config)


@dataclass(frozen=True)
class Recipe:
    """What a model without weights is made from. Equal ones make equal models.

    Attributes:
        config: class of its config.
        content: of the config, as JSON.
        kind: class of the model; None is what the config stands for.
    """

    config: Any
    content: str
    kind: type[PreTrainedModel] | None = None

    @classmethod
    def of(cls, config: PreTrainedConfig, kind: type[PreTrainedModel] | None = None) -> "Recipe":
        """Of a config as it is now."""
        without = ("dtype", "torch_dtype", "transformers_version")
        content = {name: value for name, value in config.to_dict().items() if name not in without}
        return cls(type(config), json.dumps(content, sort_keys=True, default=str), kind)

    def __call__(self) -> PreTrainedModel:
        """The model."""
        return empty_model(self.config.from_dict(json.loads(self.content)), self.kind)


def random_inputs(model: PreTrainedModel, rows: int, tokens: int) -> dict[str, Tensor]:
    """What a model can be called with: random tokens (B, S), or B images of the size that it is for."""
    generator, config = torch.Generator().manual_seed(0), layers_config(model)
    if model.main_input_name == "pixel_values":
        size = config.image_size if isinstance(config.image_size, (list, tuple)) else (config.image_size,) * 2
        images = torch.randn(rows, config.num_channels, *size, generator=generator)
        return {"pixel_values": images.to(model.device, model.dtype)}
    ids = torch.randint(0, config.vocab_size, (rows, tokens), generator=generator)
    return {"input_ids": ids.to(model.device)}


def shape_of_model(model: PreTrainedModel) -> ModelShape:
    """The sizes of a dense model."""
    config, blocks = layers_config(model), blocks_of(model)
    attention = {i: blocks[i, b] for i, b in blocks if b is Block.ATTENTION}
    mlps = {i: blocks[i, b] for i, b in blocks if b is Block.MLP}
    heads = _alike({i: _head_counts(block, config) for i, block in attention.items()}, "attention", config)
    widths = _alike({i: _mlp_sizes(block) for i, block in mlps.items()}, "MLP", config)
    if heads is None and widths is None:
        raise UserError(f"model type {config.model_type!r} has no blocks that can be pruned")
    vocabulary = model.get_output_embeddings()
    return ModelShape(
        num_layers=len(layers_of(model)),
        hidden_size=config.hidden_size,
        num_heads=heads[0] if heads else 0,
        num_key_value_heads=heads[1] if heads else 0,
        head_size=heads[2] if heads else 0,
        query_rows=heads[3] if heads else 0,
        mlp_width=widths[0] if widths else 0,
        gated=bool(widths[1]) if widths else False,
        vocabulary=0 if vocabulary is None else own_part(vocabulary.weight).shape[0],
        vocabulary_inputs=0 if vocabulary is None else _features(vocabulary)[1],
        outer_weights=sum(one.weight.numel() for one in stack_of(model).children() if isinstance(one, nn.Linear)),
        without={Block.ATTENTION: _missing(model, attention), Block.MLP: _missing(model, mlps)},
        unknown=None if _has_formulas(model, blocks) else Recipe.of(model.config, type(model)),
    )


def _has_formulas(model: PreTrainedModel, blocks: Mapping[BlockKey, BlockModules]) -> bool:
    """Whether layers are blocks of a family that is described and nothing else, but for norms."""
    family = family_of(layers_config(model))
    known = {
        id(one) for block in blocks.values() for name in block.names for one in block.projection(name).parameters()
    }
    weights = [one for layer in layers_of(model) for one in layer.parameters()]
    return family in FAMILIES and not family.refusals and all(id(one) in known for one in weights if one.dim() > 1)


def _missing(model: PreTrainedModel, found: Mapping[int, BlockModules]) -> frozenset[int]:
    return frozenset(range(len(layers_of(model)))) - found.keys()


def _alike(sizes: Mapping[int, tuple[int, ...]], name: str, config: PreTrainedConfig) -> tuple[int, ...] | None:
    found = set(sizes.values())
    if len(found) > 1:
        raise UserError(
            f"this {config.model_type} model has {name} blocks of different sizes: give one that was not pruned"
        )
    return next(iter(found), None)


def _head_counts(block: BlockModules, config: PreTrainedConfig) -> tuple[int, int, int, int]:
    """Query heads, key/value heads, head size, rows of the query projection in one head."""
    size = head_size_of(block.module, config)
    heads = _features(block.projection(block.output))[1] // size
    parts = {part.role: part.rows for own in block.inputs.values() for part in own}
    if "group" in parts:
        keys = (parts["group"] // size - heads) // 2
        return heads, keys, size, size
    return heads, parts["key"] // size, size, parts["query"] // heads


def _mlp_sizes(block: BlockModules) -> tuple[int, bool]:
    roles = [part.role for own in block.inputs.values() for part in own]
    return _features(block.projection(block.output))[1], "gate" in roles


def vocabulary_logits(model: PreTrainedModel, states: Tensor) -> Tensor:
    """What a model makes of the last layer's states (..., D): logits (..., V) float32, scaled and capped as it does."""
    logits: Tensor = model.get_output_embeddings()(states).float()
    config = model.config
    logits = logits * (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)
