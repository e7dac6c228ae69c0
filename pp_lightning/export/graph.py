"""A pruned model as one traced graph whose sizes of batch, text and cache stay open."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from pp_lightning.caches import CACHE
from pp_lightning.errors import UserError
from pp_lightning.interfaces import attention_implementation, sizes_without_special_cases
from pp_lightning.pruning import is_pruned, pruning_of

_ATTENTION = "pp_lightning_graph"


@dataclass(frozen=True)
class Graph:
    """A traced model: its program takes ``leading`` inputs, and then the rest as one list.

    Attributes:
        inputs: their names; ``outputs`` likewise.
        caches: key/value heads of every layer, for graphs with a cache.
        head_size: d.
    """

    program: ExportedProgram | None
    leading: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    caches: tuple[int, ...] = ()
    head_size: int = 0

    def without_program(self) -> "Graph":
        """The names alone: what is left once the program is on disk, so that its weights can go."""
        return replace(self, program=None)


def trace(model: PreTrainedModel, *, kv_cache: bool) -> Graph:
    """Trace a statically pruned (or dense) model.

    With a cache the graph takes ``input_ids`` (B, S), ``attention_mask`` (B, P + S), ``position_ids`` (B, S) and, for
    every layer i, ``past_key_values.i.key`` and ``.value`` (B, G_i, P, d); P is 0 at the start. It gives ``logits`` (B,
    S, V) and ``present.i.key`` and ``.value`` (B, G_i, P + S, d). Without one it takes the first three, P being 0, and
    gives the logits.
    """
    if is_pruned(model) and pruning_of(model).pruners:
        raise UserError("the choice is made per batch: export the dynamic graph")
    past = [tensor.expand(2, -1, 4, -1).contiguous() for tensor in _keys_and_values(model)] if kv_cache else []
    tokens, held = 3, 4 if kv_cache else 0
    ids = torch.zeros(2, tokens, dtype=torch.long, device=model.device)
    mask = torch.ones(2, held + tokens, dtype=torch.long, device=model.device)
    positions = torch.arange(held, held + tokens, device=model.device).expand(2, tokens).contiguous()
    batch, sequence, before = Dim("batch", min=0), Dim("sequence", min=0), Dim("past", min=0)
    text = {0: batch, 1: sequence}
    shapes: tuple[Any, ...] = (text, {0: batch, 1: Dim.AUTO}, text, [{0: batch, 2: before} for _ in past])
    with attention_for_graphs(model):
        program = traced(_WithCache(model), (ids, mask, positions, past), shapes)
    names = ("input_ids", "attention_mask", "position_ids")
    return Graph(
        program,
        leading=len(names),
        inputs=(*names, *_cache_names("past_key_values", len(past) // 2)),
        outputs=("logits", *_cache_names("present", len(past) // 2)),
        caches=tuple(key.shape[1] for key in past[::2]),
        head_size=past[0].shape[-1] if past else 0,
    )


def traced(module: nn.Module, arguments: tuple[Any, ...], shapes: tuple[Any, ...] | None) -> ExportedProgram:
    """``torch.export`` without taking sizes of 0 and 1 for special cases; without shapes, all sizes are fixed."""
    with torch.no_grad(), sizes_without_special_cases():
        return torch.export.export(module.eval(), arguments, dynamic_shapes=shapes, strict=False)


class _WithCache(nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Logits, then keys and values of all layers where there were some."""
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True))) if past else None
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
            use_cache=cache is not None,
        )
        if cache is None:
            return (output.logits,)
        return (output.logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))


@contextmanager
def attention_for_graphs(model: PreTrainedModel) -> Iterator[None]:
    """Let a model compute attention in a way that does not look at sizes.

    The stock one asks whether there is a single query, and a graph remembers the answer.
    """
    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
    before = attention_implementation(model)
    model.set_attn_implementation(_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of (B, H, S, d) to (B, G, T, d) under a mask, in the form that transformers calls: (B, S, H, d)."""
    if softcap is not None or s_aux is not None:
        raise UserError("no graph holds soft-capped scores or sinks of attention: export with --format safetensors")
    sharing = query.shape[1] // key.shape[1]
    if sharing > 1:
        key, value = key.repeat_interleave(sharing, dim=1), value.repeat_interleave(sharing, dim=1)
    assert attention_mask is not None, "a graph is traced with a mask"
    attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    copied = attended.transpose(1, 2).clone(memory_format=torch.contiguous_format)  # contiguous() looks at sizes
    return copied, None


@torch.no_grad()
def _keys_and_values(model: PreTrainedModel) -> list[Tensor]:
    """Of one token, layer by layer, (1, G_i, 1, d) each.

    Raises:
        UserError: a layer keeps something else.
    """
    cache = model(torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=True)[CACHE]
    if not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
        raise UserError("not all layers of this model keep keys and values: say --kv_cache false")
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _cache_names(prefix: str, layers: int) -> tuple[str, ...]:
    return tuple(f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value"))
