"""What the blocks of a model know of the batch that runs, and the part of it that a probe sees."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pp_lightning.blocks import Block
from pp_lightning.functional.budget import one_projection_is_cheaper
from pp_lightning.functional.moments import Places
from pp_lightning.functional.probe import Probe
from pp_lightning.methods.dynamic import AnyProbe, DynamicMethod
from pp_lightning.pruned.choice import ExecutionPlan


class Earlier(NamedTuple):
    """A residual (B, S, D) that a parallel probe can be taken from.

    Attributes:
        residual: the residual.
        since: when it was there, where that is known: on an accelerator, outside of graphs.
    """

    residual: Tensor
    since: torch.Event | None

    def on(self, device: torch.device) -> "Earlier":
        """The same where a block is: a residual of another device has waited for itself."""
        return self if self.residual.device == device else Earlier(self.residual.to(device), None)


class BatchInputs:
    """One forward pass, as every block of the model sees it. Tensors and constants only, so that it traces.

    Args:
        shape: (B, S).
        places: positions of the batch; None where columns are positions and nothing is padding.
        lots: (L, 2, M) float32, uniform numbers to draw the probes of attention and MLP with; None where none are drawn.
        decoding: the batch continues a filled cache, so the choice is held.
        caching: a cache is being filled.
        remember: whether histories move.

    Attributes:
        entered: the residual that entered the current layer, for parallel probing.
        middle: the residual between the blocks of the layer in front, for parallel probing; None where there is none.
        plans: how the current layer's blocks run, by block; None works it out.
    """

    def __init__(
        self,
        shape: torch.Size,
        places: Places | None = None,
        lots: Tensor | None = None,
        *,
        decoding: bool = False,
        caching: bool = False,
        remember: bool = True,
    ) -> None:
        self.shape = shape
        self.places = places
        self.lots = lots
        self.decoding = decoding
        self.caching = caching
        self.remember = remember
        self.entered: Earlier | None = None
        self.middle: Earlier | None = None
        self.plans: Mapping[Block, ExecutionPlan] | None = None
        self._known: dict[object, ExecutionPlan] = {}

    def of_layer(self, index: int, plans: Mapping[Block, ExecutionPlan]) -> "BatchInputs":
        """The same for one layer, without its number: layers of one shape then share a graph."""
        lots = None if self.lots is None else self.lots[index]
        one = BatchInputs(
            self.shape, self.places, lots, decoding=self.decoding, caching=self.caching, remember=self.remember
        )
        one.entered, one.middle, one.plans = self.entered, self.middle, plans
        return one

    def plan(self, method: DynamicMethod, keep: int, number: int, *, leaves: bool) -> ExecutionPlan:
        """How blocks that keep so many units of so many run this batch, worked out once."""
        key = (keep, number, leaves)
        if key not in self._known:
            rows, tokens = self.shape
            sizes = method.probe_sizes(rows, tokens)
            shares = method.probe_source == "current" and one_projection_is_cheaper(
                sizes[0] * sizes[1], rows * tokens, keep, number, sliced_anyway=leaves
            )
            self._known[key] = ExecutionPlan(sizes, shares, leaves and not shares)
        return self._known[key]

    def lots_of(self, index: int, block: int, device: torch.device) -> Tensor | None:
        """The lots (M,) of one block's probe, where the block is."""
        if self.lots is None:
            return None
        own = self.lots if self.lots.dim() == 2 else self.lots[index]
        return own[block].to(device)

    def places_on(self, device: torch.device) -> Places | None:
        """Positions of the batch, where a block is."""
        if self.places is None or self.places.real.device == device:
            return self.places
        self.places = self.places.to(device)
        return self.places

    def as_batch(self, states: Tensor) -> Tensor:
        """(B, S, C) from (B, S, C) or (B * S, C): some layers flatten rows and tokens."""
        return states if states.dim() == 3 else states.view(*self.shape, -1)


Arguments = dict[str, Any]


def probe_arguments(given: Arguments, probe: AnyProbe | None) -> Arguments:
    """A block's arguments cut to the probe's rows and tokens, at their true positions and without a cache.

    Args:
        given: by name, without the hidden states.
        probe: None is the whole batch.
    """
    cut = dict(given)
    for name in _WITHOUT_CACHE.keys() & cut.keys():
        cut[name] = _WITHOUT_CACHE[name]
    mask = cut.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 4:  # a cache of fixed size has room behind the batch
        cut["attention_mask"] = mask[..., : mask.shape[2]]
    if isinstance(probe, Probe):  # anything else goes through blocks that take no arguments
        for name in _CUTS.keys() & cut.keys():
            cut[name] = None if cut[name] is None else _CUTS[name](cut[name], probe)
    return cut


def _by_row_and_token(value: Any, probe: Probe) -> Any:
    if isinstance(value, tuple):
        return tuple(_by_row_and_token(one, probe) for one in value)
    rows = value if value.shape[0] == 1 else value.index_select(0, probe.rows)
    return rows.index_select(1, probe.tokens)


def _mask(mask: Any, probe: Probe) -> Tensor:
    """Of a mask (B or 1, 1 or H, S, T), bool or additive, (B, S), or one that is a function of indices."""
    if not isinstance(mask, Tensor):
        mask = _dense_mask(mask, probe)
    elif mask.dim() == 2:
        real = mask.index_select(0, probe.rows).index_select(1, probe.tokens)
        return real if probe.real_tokens is None else real * probe.real_tokens
    else:
        rows = mask if mask.shape[0] == 1 else mask.index_select(0, probe.rows)
        mask = rows.index_select(2, probe.tokens).index_select(3, probe.tokens)
    if probe.real_tokens is None:
        return mask
    if mask.dtype == torch.bool:
        return mask & probe.real_tokens
    return mask.masked_fill(~probe.real_tokens, torch.finfo(mask.dtype).min)


def _dense_mask(mask: Any, probe: Probe) -> Tensor:
    """A flex-attention block mask written down for the probe, additive: that is what flex attention takes beside it."""
    rows, queries = probe.rows[:, None, None, None], probe.tokens[None, None, :, None]
    keys = probe.tokens[None, None, None, :]
    allowed = mask.mask_mod(rows, torch.zeros_like(rows), queries, keys).expand(
        len(probe.rows), 1, *[len(probe.tokens)] * 2
    )
    return torch.where(allowed, 0.0, torch.finfo(torch.get_default_dtype()).min)


_CUTS: Mapping[str, Callable[[Any, Probe], Any]] = {
    "attention_mask": _mask,
    "position_embeddings": _by_row_and_token,
    "position_ids": _by_row_and_token,
}
_WITHOUT_CACHE: Mapping[str, Any] = {"past_key_values": None, "layer_past": None, "use_cache": False}
