"""The heads of an attention block in a key/value cache: all of them while a prompt runs dense, then the kept ones."""

from typing import Any

import torch
from torch import Tensor

from pp_lightning.errors import UserError
from pp_lightning.functional.selection import unit_channels
from pp_lightning.interfaces import keep_addresses
from pp_lightning.pruned.conversations import has_fixed_size

_MEMORY = "pruning_memory"  # on a cache of fixed size: keys and values by layer and number of heads


class CachedHeads:
    """What a cache holds of one attention block.

    Args:
        layer: the cache's number for it.
        whole: key/value heads of all units.
        units: U.
    """

    def __init__(self, layer: int, whole: int, units: int) -> None:
        self._layer = layer
        self._whole = whole
        self._in_unit = whole // units  # 0 where heads are shared by all units, so that all of them stay

    def begin(self, cache: Any, kept: int | None) -> None:
        """Before a prompt: let an empty cache that was used before take another number of heads.

        Args:
            cache: without tokens.
            kept: units of the prompt; None is all of them.
        """
        layer = _layer_of(cache, self._layer)
        if layer is None or not self._in_unit:
            return
        heads = self._whole if kept is None else kept * self._in_unit
        if layer.keys.shape[1] == heads:
            return
        if not has_fixed_size(cache):
            layer.reset()
            return
        found = self._swap(cache, layer, heads)
        if found is None:
            layer.is_initialized = False  # it takes memory with the first keys
        else:
            for tensor in found:
                tensor.zero_()

    def narrow(self, cache: Any, kept: Tensor) -> None:
        """After a dense prompt: drop the heads that do not stay. A cache of fixed size keeps memory for both.

        Args:
            cache: filled with all heads.
            kept: (K,) int64, units.
        """
        layer = _layer_of(cache, self._layer)
        if layer is None or not self._in_unit:
            return
        index = unit_channels(kept, self._in_unit).to(layer.keys.device)
        if not has_fixed_size(cache):
            layer.keys, layer.values = (one.index_select(1, index) for one in (layer.keys, layer.values))
            return
        whole = layer.keys, layer.values
        found = self._swap(cache, layer, len(index))
        if found is None:
            with torch.inference_mode(False):
                found = tuple(one.new_empty(one.shape[0], len(index), *one.shape[2:]) for one in whole)
            keep_addresses([found])
            layer.keys, layer.values = found
        for own, every in zip(found, whole, strict=True):
            torch.index_select(every, 1, index, out=own)

    def _swap(self, cache: Any, layer: Any, heads: int) -> tuple[Tensor, ...] | None:
        """Put the memory for so many heads into place, if there is any, and remember what was there."""
        memory: dict[tuple[int, int], tuple[Tensor, ...]] = cache.__dict__.setdefault(_MEMORY, {})
        memory[self._layer, layer.keys.shape[1]] = layer.keys, layer.values
        found = memory.get((self._layer, heads))
        if found is not None:
            layer.keys, layer.values = found
        return found


def check_can_narrow(cache: Any) -> None:
    """Refuse, before a dense prompt, a cache whose heads cannot be dropped afterwards.

    Raises:
        UserError: it keeps keys in a form of its own.
    """
    for layer in getattr(cache, "layers", ()):
        if hasattr(layer, "_quantize"):
            raise UserError(
                f"a dense prompt needs a cache that heads can be dropped from, not a {type(cache).__name__}: use "
                "prefill=probe or a DynamicCache"
            )


def _layer_of(cache: Any, number: int) -> Any:
    """One layer of a cache, if keys were put there."""
    layers = getattr(cache, "layers", ())
    layer = layers[number] if number < len(layers) else None
    keys = getattr(layer, "keys", None)
    return layer if getattr(layer, "is_initialized", False) and isinstance(keys, Tensor) and keys.dim() == 4 else None
