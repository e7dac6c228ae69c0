"""Tiny random models, one row an architecture, and batches for them.

A new architecture is one row in ``FAMILIES``: every test of ``test_families.py`` then covers it. Most other tests are
parametrised over the few in ``MODELS``.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from pp_lightning import KeptUnits, Statistics, calibrate, frozen_history, kept_units, prune_
from pp_lightning.blocks import AttentionUnit, Block
from pp_lightning.errors import UserError
from pp_lightning.families import blocks_of, shape_of
from pp_lightning.methods import ProbePruning, PruningMethod
from pp_lightning.pruned.block import PrunedBlock
from pp_lightning.pruning import is_pruned, pruning_of
from tests.replicas import replicas

VOCABULARY = 96
HEADS, GROUPS, MLP_WIDTH, LAYERS = 8, 4, 160, 5
SKIPPED = (0, 1)
PRUNED = (2, 3, 4)
ROWS, TOKENS = 4, 24
CALIBRATED = 32  # positions that `statistics` covers

# At ratio 0.4 with SKIPPED: 3 of 8 heads, 2 of 4 groups and 64 of 160 channels stay.
SETTINGS: dict[str, Any] = {"pruning_ratio": 0.4, "skip_layers": SKIPPED, "round_to": 16}


@dataclass(frozen=True)
class Tiny:
    """One architecture.

    Attributes:
        config: its config class, or its model type.
        grouped: whether query heads share key/value heads.
        particulars: of its config.
        attention: how it computes attention: SDPA knows no soft caps and no sinks.
        refuses: blocks that cannot be pruned, and part of the reason given.
    """

    config: type[PreTrainedConfig] | str
    grouped: bool
    particulars: dict[str, Any] = field(default_factory=dict)
    attention: str = "sdpa"
    refuses: dict[Block, str] = field(default_factory=dict)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Those that can be pruned."""
        return tuple(block for block in Block if block not in self.refuses)


MODELS = {
    "llama": Tiny(LlamaConfig, False, {"intermediate_size": MLP_WIDTH}),
    "llama_gqa": Tiny(LlamaConfig, True, {"intermediate_size": MLP_WIDTH}),
    # windows shorter than the texts, so that a mask is made where nothing is padding
    "mistral": Tiny(MistralConfig, True, {"intermediate_size": MLP_WIDTH, "sliding_window": 16, "head_dim": 8}),
    # biases in query, key and value; windows in the upper layers only
    "qwen2": Tiny(
        Qwen2Config,
        True,
        {
            "intermediate_size": MLP_WIDTH,
            "use_sliding_window": True,
            "sliding_window": 16,
            "max_window_layers": 3,
        },
    ),
    # norms on queries and keys; heads together wider than the residual stream
    "qwen3": Tiny(Qwen3Config, True, {"intermediate_size": MLP_WIDTH, "head_dim": 16}),
    "opt": Tiny(OPTConfig, False, {"ffn_dim": MLP_WIDTH, "word_embed_proj_dim": 64}),
}
GROUPED = [name for name, row in MODELS.items() if row.grouped]

_MIXED = ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
_HYBRID = ["linear_attention", "full_attention", "linear_attention", "full_attention", "linear_attention"]
_WINDOWS = {"sliding_window": 16, "layer_types": _MIXED}  # shorter than the texts
_LINEAR = {
    "layer_types": _HYBRID,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_EXPERTS = {Block.MLP: "its channels are those of routed experts"}
_FEW_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}


def _row(kind: str, *, grouped: bool = True, attention: str = "sdpa", refuses: Any = None, **particulars: Any) -> Tiny:
    return Tiny(kind, grouped, {"intermediate_size": MLP_WIDTH, **particulars}, attention, refuses or {})


# Every family that is described, each with what could go wrong in it: biases, norms, caps, windows, kinds of layers.
FAMILIES = MODELS | {
    "llama_bias": _row("llama", attention_bias=True, mlp_bias=True),
    "ministral": _row("ministral", head_dim=16, **_WINDOWS),
    "ministral3": _row(
        "ministral3",
        head_dim=16,
        sliding_window=16,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 16,
        },
    ),
    "gemma": _row("gemma", head_dim=16),
    "gemma2": _row(
        "gemma2", attention="eager", head_dim=16, attn_logit_softcapping=2.0, final_logit_softcapping=5.0, **_WINDOWS
    ),
    "gemma3_text": _row("gemma3_text", head_dim=16, query_pre_attn_scalar=16, **_WINDOWS),
    "smollm3": _row("smollm3", use_sliding_window=True, no_rope_layers=[1, 0, 1, 0, 1], **_WINDOWS),
    "granite": _row(
        "granite",
        attention_bias=True,
        attention_multiplier=0.3,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        logits_scaling=2.0,
    ),
    "starcoder2": _row("starcoder2", sliding_window=16),
    "arcee": _row("arcee", attention_bias=True, mlp_bias=True, head_dim=16),
    "nemotron": _row("nemotron", attention_bias=True, mlp_bias=True, head_dim=16),
    "apertus": _row("apertus", attention_bias=True, **_PLAIN_ROPE),
    "seed_oss": _row("seed_oss", head_dim=16, attention_out_bias=True),
    "ernie4_5": _row("ernie4_5", head_dim=16, use_bias=True),
    "hunyuan_v1_dense": _row("hunyuan_v1_dense", head_dim=16),
    "helium": _row("helium", head_dim=8, attention_bias=True),
    "olmo": _row("olmo", clip_qkv=1.0),
    "cohere": _row("cohere", logit_scale=1.0),
    "cohere_qk_norm": _row("cohere", logit_scale=1.0, use_qk_norm=True),
    "cohere2": _row("cohere2", head_dim=16, logit_scale=1.0, **_WINDOWS),
    "phi": _row("phi", qk_layernorm=True, partial_rotary_factor=0.5),
    "exaone4": _row("exaone4", **_WINDOWS),
    "llama4_text": _row("llama4_text", head_dim=16, attention_chunk_size=16, moe_layers=[], intermediate_size_mlp=160),
    "llama4_text_experts": _row(  # experts in every second layer; no rotary positions in the fourth
        "llama4_text",
        head_dim=16,
        attention_chunk_size=16,
        interleave_moe_layer_step=2,
        num_local_experts=4,
        intermediate_size=48,
        intermediate_size_mlp=160,
    ),
    "nanochat": _row("nanochat", attention_bias=True),
    "stablelm": _row("stablelm", use_qkv_bias=True),
    "stablelm_qk_norm": _row(
        "stablelm", qk_layernorm=True, refuses={Block.ATTENTION: "its code does not compute the same on fewer units"}
    ),
    "stablelm_parallel": _row("stablelm", grouped=False, num_key_value_heads=HEADS, use_parallel_residual=True),
    "phi3": _row("phi3", sliding_window=16, partial_rotary_factor=0.5),
    "glm": _row("glm", head_dim=16),
    "glm4": _row("glm4", head_dim=16),
    "gpt_neox": _row("gpt_neox", grouped=False),
    "gpt_neox_sequential": _row("gpt_neox", grouped=False, use_parallel_residual=False),
    "falcon": _row("falcon", new_decoder_architecture=True, num_kv_heads=GROUPS, ffn_hidden_size=MLP_WIDTH),
    "falcon_multi_query": _row("falcon", grouped=False, multi_query=True, bias=True, ffn_hidden_size=MLP_WIDTH),
    "falcon_classic": _row(
        "falcon", grouped=False, multi_query=False, bias=True, parallel_attn=False, ffn_hidden_size=MLP_WIDTH
    ),
    "falcon_alibi": _row(
        "falcon",
        grouped=False,
        multi_query=False,
        alibi=True,
        ffn_hidden_size=MLP_WIDTH,
        refuses={Block.ATTENTION: "its code does not run on fewer units"},
    ),
    "olmo2": _row("olmo2", refuses={Block.ATTENTION: "over all heads together"}),
    "olmo3": _row("olmo3", refuses={Block.ATTENTION: "over all heads together"}, **_WINDOWS),
    "qwen3_5_text": _row("qwen3_5_text", head_dim=16, **_LINEAR),
    "qwen3_next": _row(  # experts but for one layer
        "qwen3_next",
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=48,
        mlp_only_layers=[2],
        **_LINEAR,
    ),
    "mixtral": _row("mixtral", sliding_window=16, refuses=_EXPERTS, **_FEW_EXPERTS),
    "qwen3_moe": _row(
        "qwen3_moe", head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, refuses=_EXPERTS
    ),
    "granitemoe": _row(
        "granitemoe", attention_multiplier=0.3, residual_multiplier=0.5, refuses=_EXPERTS, **_FEW_EXPERTS
    ),
    "gpt_oss": _row(
        "gpt_oss", attention="eager", head_dim=16, refuses=_EXPERTS, **_FEW_EXPERTS, **_WINDOWS, **_PLAIN_ROPE
    ),
    "diffllama": _row("diffllama", refuses={Block.ATTENTION: "its heads work in pairs"}),
    "deepseek_v3": _row(
        "deepseek_v3",
        grouped=False,
        num_key_value_heads=HEADS,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=32,
        refuses={Block.ATTENTION: "its heads share one latent projection"},
    ),
}


# One of each kind of layer: plain and grouped heads, caps, fused and parallel blocks, norms, recurrences, experts.
CORE = ("llama_gqa", "opt", "gemma2", "phi3", "falcon", "gpt_neox", "cohere_qk_norm", "qwen3_next", "gpt_oss")


def families(core: Iterable[str] = CORE, names: Iterable[str] = FAMILIES) -> list[Any]:
    """All of them, for ``parametrize``: those of the core in every run, the others among the slow tests."""
    return [name if name in core else pytest.param(name, marks=pytest.mark.slow) for name in names]


def pairs(names: Iterable[str], others: Iterable[Any]) -> list[tuple[str, Any]]:
    """The first name with every other, and each name with one of them in turn: not all with all."""
    names, others = list(names), list(others)
    in_turn = [(name, others[number % len(others)]) for number, name in enumerate(names)]
    return list(dict.fromkeys([(names[0], other) for other in others] + in_turn))


def config(name: str, **overrides: Any) -> PreTrainedConfig:
    """The config of a tiny model."""
    row = FAMILIES[name]
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if row.grouped:
        sizes["num_key_value_heads"] = GROUPS
    given = {**sizes, **row.particulars, **overrides}
    return AutoConfig.for_model(row.config, **given) if isinstance(row.config, str) else row.config(**given)


def tiny(name: str, **overrides: Any) -> PreTrainedModel:
    """A new copy of the tiny model, always with the same weights."""
    return cast(PreTrainedModel, _tiny(name, tuple(sorted(overrides.items())))())


@lru_cache
def _tiny(name: str, overrides: tuple[tuple[str, Any], ...]) -> Callable[[], Any]:
    given = dict(overrides)
    attention = given.pop("attn_implementation", FAMILIES[name].attention)
    model = AutoModelForCausalLM.from_config(config(name, **given), attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            is_norm = path.endswith("weight") and any(part in path for part in ("norm", "ln_"))
            weight.copy_(weight + 0.2 * noise if is_norm else noise if path.endswith("sinks") else 0.15 * noise)
    return replicas(model)


def ids(rows: int = ROWS, tokens: int = TOKENS, seed: int = 0) -> Tensor:
    """Random token ids (rows, tokens), none of them special."""
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def padded(text: Tensor, left: int = 0, right: int = 0) -> dict[str, Tensor]:
    """The same rows with padding, which is an ordinary token: only the mask tells."""
    shape = text.shape[0]
    fill = [torch.full((shape, n), 5) for n in (left, right)]
    ones = torch.ones_like(text)
    mask = [torch.zeros_like(f) for f in fill]
    return {
        "input_ids": torch.cat([fill[0], text, fill[1]], dim=1),
        "attention_mask": torch.cat([mask[0], ones, mask[1]], dim=1),
    }


def ragged(lengths: list[int], side: str, seed: int = 0) -> dict[str, Tensor]:
    """Rows of these lengths, padded on one side to the longest."""
    longest = max(lengths)
    rows = []
    for index, length in enumerate(lengths):
        text = ids(1, length, seed + index)
        rows.append(padded(text, **{side: longest - length}))
    return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}


def calibration_batches(number: int = 3, tokens: int = CALIBRATED) -> list[dict[str, Tensor]]:
    """Batches without padding, for ``calibrate``."""
    return [{"input_ids": ids(ROWS, tokens, 100 + index)} for index in range(number)]


def statistics(name: str) -> Statistics:
    """The statistics of ``tiny(name)`` over ``calibration_batches()``; a new copy, so that a test may spoil it."""
    return cast(Statistics, _statistics(name)())


@lru_cache
def _statistics(name: str) -> Callable[[], Any]:
    return replicas(calibrate(tiny(name), calibration_batches(), progress=False))


def pruned(
    name: str = "llama",
    method: Callable[[], PruningMethod] = ProbePruning,
    model: PreTrainedModel | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """``tiny(name)``, or a model like it, pruned under SETTINGS but for those that are given."""
    model = tiny(name) if model is None else model
    prune_(model, method(), statistics(name), **{**SETTINGS, **settings})
    return model


def close(found: Tensor, expected: Tensor) -> None:
    """Equal but for float32's rounding."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def assert_same_weights(model: PreTrainedModel, dense: PreTrainedModel) -> None:
    """Bit for bit, under the same names."""
    expected = dense.state_dict()
    assert list(model.state_dict()) == list(expected)
    for name, weight in model.state_dict().items():
        assert weight.dtype == expected[name].dtype
        assert torch.equal(weight, expected[name]), name


def assert_stock(model: PreTrainedModel, dense: PreTrainedModel) -> None:
    """Nothing of ours is left: weights, logits, classes, forwards, hooks and attributes."""
    assert_same_weights(model, dense)
    assert torch.equal(logits(model, ids()), logits(dense, ids()))
    assert not is_pruned(model)
    for (name, module), (other_name, other) in zip(model.named_modules(), dense.named_modules(), strict=True):
        assert (name, type(module)) == (other_name, type(other))
        assert "forward" not in vars(module)
        assert len(module._forward_pre_hooks) == len(other._forward_pre_hooks)
        assert len(module._forward_hooks) == len(other._forward_hooks)
        assert getattr(module, "config", None).__class__ is getattr(other, "config", None).__class__
        # no attribute that a stock module has not, and plain ones as they were
        assert vars(module).keys() == vars(other).keys(), name
        plain = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str | bool)}
        assert plain == {k: v for k, v in vars(other).items() if isinstance(v, int | float | str | bool)}


@torch.no_grad()
def logits(model: PreTrainedModel, text: Tensor, **arguments: Any) -> Tensor:
    """Logits without a cache."""
    result: Tensor = model(input_ids=text, use_cache=False, **arguments).logits
    return result


def pruned_blocks(model: PreTrainedModel) -> dict[tuple[int, Block], PrunedBlock]:
    """The blocks of a dynamically pruned model that choose, by layer and block."""
    return pruning_of(model).pruners


def histories(model: PreTrainedModel) -> dict[tuple[int, str], Tensor]:
    """Copies of all histories of a dynamically pruned model."""
    return {
        (index, name.value): block.history.clone()
        for (index, name), block in pruned_blocks(model).items()
        if block.history is not None
    }


def held_by(cache: Any) -> list[dict[str, Any]] | None:
    """The slices that the tokens after a prompt run on, by block; None where they were let go."""
    found: list[dict[str, Any]] | None = cache.pruning_choice.held
    return found


def choices(kept: dict[int, KeptUnits]) -> dict[int, tuple[list[int], list[int]]]:
    """Kept units in plain lists, to compare with ``==``."""
    return {index: (units.attention.tolist(), units.mlp.tolist()) for index, units in kept.items()}


def masked_dense(dense: PreTrainedModel, kept: dict[int, KeptUnits], num_units: int) -> PreTrainedModel:
    """A dense model with zeros in its output matrices, in the columns of the units that were dropped.

    Args:
        dense: changed, and returned.
        kept: of a pruned model with the same weights.
        num_units: attention units of a layer: query heads, or key/value groups.
    """
    blocks = blocks_of(dense)
    for index, units in kept.items():
        for block, own in ((Block.ATTENTION, units.attention), (Block.MLP, units.mlp)):
            if len(own):  # a layer may have no such block
                weight = blocks[index, block].output_weight
                _zero_dropped(weight, own, weight.shape[1] // num_units if block is Block.ATTENTION else 1)
    return dense


def silenced(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """``tiny(name)`` with the units zeroed that a pruned one dropped for its last batch."""
    shape = shape_of(tiny(name).config)
    groups = pruning_of(model).plan.unit is AttentionUnit.KV_GROUP
    return masked_dense(tiny(name), kept_units(model), shape.num_key_value_heads if groups else shape.num_heads)


def output_weights(model: PreTrainedModel, layer: int) -> tuple[Tensor, Tensor]:
    """The output matrices (D, C) of a layer's attention and MLP block."""
    blocks = blocks_of(model)
    return blocks[layer, Block.ATTENTION].output_weight, blocks[layer, Block.MLP].output_weight


def plant(
    model: PreTrainedModel, heads: tuple[int, ...] = (1, 4, 6), seed: int = 3
) -> tuple[PreTrainedModel, dict[int, tuple[list[int], list[int]]]]:
    """Make three heads and 64 channels of every pruned layer matter far more than the rest, in any precision."""
    channels = torch.randperm(MLP_WIDTH, generator=torch.Generator().manual_seed(seed))[:64].sort().values
    with torch.no_grad():
        for layer in range(LAYERS):
            attention, mlp = output_weights(model, layer)
            width = attention.shape[1] // HEADS
            columns = torch.zeros(attention.shape[1], dtype=torch.bool)
            for head in heads:
                columns[head * width : (head + 1) * width] = True
            attention[:, columns] *= 3
            attention[:, ~columns] *= 0.1
            stays = torch.zeros(MLP_WIDTH, dtype=torch.bool)
            stays[channels] = True
            mlp[:, stays] *= 2
            mlp[:, ~stays] *= 0.02
            if model.config.model_type == "opt":  # no channel that is silent on every token
                model.model.decoder.layers[layer].fc1.bias += 4.0
    return model, {layer: (list(heads), channels.tolist()) for layer in PRUNED}


@torch.no_grad()
def _zero_dropped(weight: Tensor, kept: Tensor, width: int) -> None:
    stays = torch.zeros(weight.shape[1], dtype=torch.bool)
    for unit in kept.tolist():
        stays[unit * width : (unit + 1) * width] = True
    weight[:, ~stays] = 0.0


@torch.no_grad()
def greedy_without_cache(model: PreTrainedModel, batch: dict[str, Tensor], steps: int) -> Tensor:
    """The most likely continuation, the whole text run again for each token: (rows, steps)."""
    text, mask = batch["input_ids"], batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    start = text.shape[1]
    for _ in range(steps):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        step = model(input_ids=text, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
        text = torch.cat([text, step.argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return text[:, start:]


@torch.no_grad()
def run_frozen(model: PreTrainedModel, text: Tensor, **arguments: Any) -> Tensor:
    """Logits, with the histories left alone."""
    with frozen_history(model):
        return logits(model, text, **arguments)


def refusals(asked: Iterable[Callable[[], object]]) -> list[str]:
    """What is said about each of these, where it is refused."""
    said = []
    for one in asked:
        try:
            one()
        except UserError as error:
            said.append(str(error))
    return said
