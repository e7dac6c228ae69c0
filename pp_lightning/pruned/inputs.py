"""What the blocks of a model know of the batch that runs, and the part of it that a probe sees."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pp_lightning.blocks import Block
from pp_lightning.functional.budget import one_projection_is_cheaper
from pp_lightning.functional.moments import TokenPositions
from pp_lightning.methods.dynamic import DynamicMethod
from pp_lightning.pruned.choice import Choice, ExecutionPlan
from pp_lightning.pruned.conversations import Conversation
from pp_lightning.pruned.refreshing import RecentInputs


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


class Result(NamedTuple):
    """What one block leaves of a batch.

    Attributes:
        choice: what it ran on.
        moment: (P, K * w) float32, second moment of the kept channels by position; None leaves the history alone.
        present: (P,) bool, positions that had a real token; None means all.
        mean: (K * w,) float32, of the kept channels; None where no running mean is kept.
    """

    choice: Choice
    moment: Tensor | None = None
    present: Tensor | None = None
    mean: Tensor | None = None


class State(NamedTuple):
    """What a block remembers, as it was when a batch began.

    Attributes:
        history: (P_max, C) float32, or None for methods without.
        mean: (C,) float32, or None for methods without.
    """

    history: Tensor | None
    mean: Tensor | None


class BatchInputs:
    """One forward pass, as every block of the model sees it. Tensors and constants only, so that it traces.

    What belongs to a block is found by :data:`BlockKey`; in a graph of one layer by :class:`Block`, as layers of one
    shape share it.

    Args:
        shape: (B, S); of a prompt known when it enters the layers.
        places: positions of the batch; None where columns are positions and nothing is padding.
        samples: (L, 2, M) float32, uniform numbers to draw the probes of attention and MLP with; None draws none.
        conversation: of the cache that is being filled; None without one.
        decoding: the batch continues a filled cache, so the choice is held.
        remember: whether histories move.

    Attributes:
        dense: whether the batch is a prompt that runs on all units.
        since: what channels are chosen from anew, of a batch that continues a cache; None holds the choice.
        states: what each block remembers.
        results: what each block has left.
        buffer: memory for one slice at a time; None takes fresh memory.
        rooms: memory for the slices that are left for decoding, by block; empty where none are.
        residuals: what entered the norm in front of a block.
        attended: (B, S) float32, the attention that each token got in the layer in front; None where nobody told.
        entered: the residual that entered the current layer, for parallel probing.
        middle: the residual between the blocks of the layer in front, for parallel probing; None where there is none.
        plans: how the current layer's blocks run, by block; None where that is asked of :attr:`known_plans`.
        known_plans: by units that stay, all units, and whether the slices are left for decoding.
    """

    def __init__(
        self,
        shape: torch.Size | None = None,
        places: TokenPositions | None = None,
        samples: Tensor | None = None,
        *,
        conversation: Conversation | None = None,
        decoding: bool = False,
        remember: bool = True,
    ) -> None:
        self.shape = torch.Size() if shape is None else shape
        self.places = places
        self.samples = samples
        self.conversation = conversation
        self.decoding = decoding
        self.remember = remember
        self.dense = False
        self.since: RecentInputs | None = None
        self.states: dict[Any, State] = {}
        self.results: dict[Any, Result] = {}
        self.buffer: Tensor | None = None
        self.rooms: dict[Any, Tensor] = {}
        self.residuals: dict[Any, Tensor] = {}
        self.attended: Tensor | None = None
        self.entered: Earlier | None = None
        self.middle: Earlier | None = None
        self.plans: Mapping[Block, ExecutionPlan] | None = None
        self.known_plans: dict[tuple[int, int, bool], ExecutionPlan] = {}

    def of_layer(self, index: int, plans: Mapping[Block, ExecutionPlan]) -> "BatchInputs":
        """The same for one layer, without its number: layers of one shape then share a graph."""
        samples = None if self.samples is None else self.samples[index]
        one = BatchInputs(self.shape, self.places, samples, decoding=self.decoding, remember=self.remember)
        one.entered, one.middle, one.plans, one.buffer = self.entered, self.middle, plans, self.buffer
        one.dense, one.attended = self.dense, self.attended
        one.states = {block: self.states[index, block] for block in plans}
        one.rooms = {block: self.rooms[index, block] for block in plans if plans[block].leaves}
        return one

    def take_results(self, index: int, one: "BatchInputs") -> None:
        """What a graph of one layer has left."""
        self.middle, self.attended = one.middle, one.attended
        self.results |= {(index, block): result for block, result in one.results.items()}

    def plan(self, method: DynamicMethod, keep: int, number: int, leaves: bool) -> ExecutionPlan:
        """How blocks that keep so many units of so many run this batch: worked out once, then :attr:`known_plans`."""
        rows, tokens = self.shape
        sizes = method.probe_sizes(rows, tokens)
        shares = method.probe_source == "current" and one_projection_is_cheaper(
            sizes[0] * sizes[1], rows * tokens, keep, number, sliced_anyway=leaves
        )
        found = self.known_plans[keep, number, leaves] = ExecutionPlan(sizes, shares, leaves and not shares)
        return found

    def samples_of(self, index: int, attention: bool, device: torch.device) -> Tensor:
        """The samples (M,) of one block's probe, where the block is."""
        assert self.samples is not None
        own = self.samples if self.samples.dim() == 2 else self.samples[index]
        return own[0 if attention else 1].to(device)

    def places_on(self, device: torch.device) -> TokenPositions | None:
        """Positions of the batch, where a block is."""
        if self.places is None or self.places.real.device == device:
            return self.places
        self.places = self.places.to(device)
        return self.places

    def as_batch(self, states: Tensor) -> Tensor:
        """(B, S, C) from (B, S, C) or (B * S, C): some layers flatten rows and tokens."""
        return states if states.dim() == 3 else states.view(*self.shape, -1)
