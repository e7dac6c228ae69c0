"""The heads of an attention block in a key/value cache: all of them while a prompt runs dense, then the kept ones."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pp_lightning.errors import UserError
from pp_lightning.functional.selection import unit_channels
from pp_lightning.interfaces import keep_addresses
from pp_lightning.pruned.conversations import has_fixed_size

_MEMORY = "pruning_memory"  # on a cache of fixed size


@dataclass
class Memory:
    """Keys and values of one layer of a cache of fixed size: of all heads, and of as many as stay.

    Attributes:
        holds_all: whether the layer has those of all heads at the moment.
        waiting: the other ones, by whether they are of all heads.
    """

    holds_all: bool = False
    waiting: dict[bool, tuple[Tensor, ...]] = field(default_factory=dict)

    def swap(self, layer: Any, *, every: bool) -> tuple[Tensor, ...] | None:
        """Put memory of the other kind into place, if there is any, and keep what was there."""
        self.waiting[self.holds_all] = layer.keys, layer.values
        self.holds_all = every
        found = self.waiting.get(every)
        if found is not None:
            layer.keys, layer.values = found
        return found


class CachedHeads:
    """What a cache holds of one attention block."""

    def __init__(self, layer: int, units: int) -> None:
        self._layer = layer
        self._units = units

    def begin(self, cache: Any, *, every: bool) -> None:
        """Before a prompt: let an empty cache that was used before take another number of heads."""
        layer = _layer_of(cache, self._layer)
        if not has_fixed_size(cache):
            if layer is not None:
                layer.reset()
            return
        memory = self._memory(cache)
        if layer is None or memory.holds_all == every:
            memory.holds_all = every
            return
        found = memory.swap(layer, every=every)
        if found is None:
            layer.is_initialized = False  # it takes memory with the first keys
        else:
            for tensor in found:
                tensor.zero_()

    def narrow(self, cache: Any, kept: Tensor) -> None:
        """After a dense prompt: drop the heads that do not stay. A cache of fixed size keeps memory for both."""
        layer = _layer_of(cache, self._layer)
        heads = 0 if layer is None else layer.keys.shape[1]
        if heads < self._units:  # shared by all units: they stay
            return
        whole = layer.keys, layer.values
        index = unit_channels(kept, heads // self._units).to(whole[0].device)
        if not has_fixed_size(cache):
            layer.keys, layer.values = (one.index_select(1, index) for one in whole)
            return
        found = self._memory(cache).swap(layer, every=False)
        if found is None:
            with torch.inference_mode(False):
                found = tuple(one.new_empty(one.shape[0], len(index), *one.shape[2:]) for one in whole)
            keep_addresses([found])
            layer.keys, layer.values = found
        for own, every in zip(found, whole, strict=True):
            torch.index_select(every, 1, index, out=own)

    def _memory(self, cache: Any) -> Memory:
        found: Memory = cache.__dict__.setdefault(_MEMORY, {}).setdefault(self._layer, Memory())
        return found


def check_can_narrow(cache: Any) -> None:
    """Refuse, before a dense prompt, a cache whose heads cannot be dropped afterwards."""
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
