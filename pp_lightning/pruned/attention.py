"""The attention block, pruned by heads or by key/value groups."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pp_lightning.blocks import Units
from pp_lightning.functional.attention import attend, join_heads, rotate, split_heads
from pp_lightning.pruned.block import PrunedBlock
from pp_lightning.pruned.surroundings import Surroundings


class PrunedAttention(PrunedBlock):
    """Causal self-attention on the kept heads.

    A unit takes its own rows of the query projection and columns of the output projection with it. Where query heads
    share key/value heads, a unit is either the whole group, which takes the key and value rows too, or a single query
    head, which leaves keys and values whole.

    Args:
        head_size: d.
        scale: factor on the query-key products.
        layer_index: the layer's slot in the cache.
        queries_per_key: H / G.
        units: heads, or groups of them.
        **block: see :class:`PrunedBlock`.
    """

    mixes_tokens = True

    def __init__(
        self, *, head_size: int, scale: float, layer_index: int, queries_per_key: int, units: Units, **block: Any
    ) -> None:
        # Single query heads of a group: keys and values are computed whole, then picked for each query head.
        shares_keys = queries_per_key > 1 and units.channels == head_size
        widths = {"query": units.channels, "output": units.channels}
        if not shares_keys:
            widths |= dict.fromkeys(("key", "value"), units.channels // queries_per_key)
        super().__init__(units=units, widths=widths, **block)
        self.head_size = head_size
        self.scale = scale
        self.layer_index = layer_index
        self.queries_per_key = queries_per_key
        self.shares_keys = shares_keys

    def mix(self, projected: Mapping[str, Tensor], around: Surroundings, kept: Tensor | None) -> Tensor:
        """Queries, keys and values (B, S, heads * d) to the input of the output projection, (B, S, K * d)."""
        query, key, value = (split_heads(projected[role], self.head_size) for role in ("query", "key", "value"))
        query, key = self._normed("query_norm", query), self._normed("key_norm", key)
        if around.rotation is not None:
            query, key = rotate(query, *around.rotation), rotate(key, *around.rotation)
        if around.cache is not None:
            key, value = around.cache.update(key, value, self.layer_index)
        if self.shares_keys and kept is not None:
            heads = kept // self.queries_per_key
            key, value = key.index_select(1, heads), value.index_select(1, heads)
        return join_heads(attend(query, key, value, around.mask, self.scale))

    def _normed(self, role: str, states: Tensor) -> Tensor:
        norm: nn.Module | None = self.parts.extras.get(role)
        return states if norm is None else norm(states)
