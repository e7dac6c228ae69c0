"""What the projections of a block do while its stock code runs: show the probe's states, or run on the kept units."""

from collections.abc import Callable

import torch
from torch import Tensor

from pp_lightning.functional.selection import unit_channels
from pp_lightning.pruned.choice import Choice
from pp_lightning.pruned.projection import PrunedProjection
from pp_lightning.pruned.slices import Slice


class Probing:
    """All units, up to the output projection, which shows what reaches it.

    Args:
        ahead: outputs of the other projections by name, where they are there already.

    Attributes:
        seen: (b, s, C), the input of the output projection.
        kept: all.
    """

    kept: Tensor | None = None

    def __init__(self, ahead: dict[str, Tensor] | None = None) -> None:
        self.ahead = ahead
        self.seen: Tensor | None = None

    def enter(self, projection: PrunedProjection, states: Tensor) -> Tensor:
        """The outputs of all units."""
        return projection.whole(states) if self.ahead is None else self.ahead[projection.name]

    def leave(self, projection: PrunedProjection, states: Tensor) -> Tensor:
        """Keep what is asked for. What the stock code makes of the result is of no interest."""
        self.seen = states
        return states


class OnChoice:
    """The kept units alone.

    Args:
        weights: slices of them.
        choice: what was chosen.
        remember: told the states (..., K * w) that reach the output projection; None tells nobody.
        ahead: outputs of all units by projection, where they are there already.
    """

    def __init__(
        self,
        weights: Slice,
        choice: Choice,
        remember: Callable[[Tensor, Tensor], None] | None = None,
        ahead: dict[str, Tensor] | None = None,
    ) -> None:
        self.weights = weights
        self.choice = choice
        self.remember = remember
        self.ahead = ahead

    @property
    def kept(self) -> Tensor | None:
        """(K,) int64."""
        return self.choice.kept

    def enter(self, projection: PrunedProjection, states: Tensor) -> Tensor:
        """The outputs of the kept units."""
        if self.ahead is None:
            return projection.sliced(states, self.weights, self.choice.kept)
        return projection.of_units(self.ahead[projection.name], self.choice.kept)

    def leave(self, projection: PrunedProjection, states: Tensor) -> Tensor:
        """The output."""
        if self.remember is not None:
            self.remember(states, self.choice.kept)
        return projection.sliced_output(states, self.weights, *self.choice)


class Masked:
    """All units, those that are not kept silenced in front of the output projection: what slicing must equal.

    Args:
        channels: (K * w,) int64, the columns of the output matrix that stay.
    """

    kept: Tensor | None = None

    def __init__(self, channels: Tensor) -> None:
        self.channels = channels

    def enter(self, projection: PrunedProjection, states: Tensor) -> Tensor:
        """The outputs of all units."""
        return projection.whole(states)

    def leave(self, projection: PrunedProjection, states: Tensor) -> Tensor:
        """The output of the states that stay."""
        silent = torch.ones(states.shape[-1], dtype=torch.bool, device=states.device).index_fill(
            0, self.channels, False
        )
        return projection.stock(states.masked_fill(silent, 0.0))


class ChoosingAtOutput:
    """All units up to the output projection, which goes on with those that are chosen by what reaches it.

    Args:
        choose: from all states (B, S, C) or (B * S, C), the :class:`OnChoice` to go on with.
        channels: columns of the output matrix in one unit.
    """

    kept: Tensor | None = None

    def __init__(self, choose: Callable[[Tensor], OnChoice], channels: int) -> None:
        self.choose = choose
        self.channels = channels

    def enter(self, projection: PrunedProjection, states: Tensor) -> Tensor:
        """The outputs of all units."""
        return projection.whole(states)

    def leave(self, projection: PrunedProjection, states: Tensor) -> Tensor:
        """The output of the units that are chosen now."""
        run = self.choose(states)
        return run.leave(projection, states.index_select(-1, unit_channels(run.choice.kept, self.channels)))
