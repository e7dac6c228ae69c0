"""What stands around one projection of a pruned block. The projection itself is called or sliced, never replaced."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pp_lightning.functional.linear import linear
from pp_lightning.functional.selection import Rows, store_by_columns, unit_channels
from pp_lightning.interfaces import run_stock
from pp_lightning.pruned.slices import Matrix, Slice


class Run(Protocol):
    """What the projections of a block do while the block's own code runs.

    Attributes:
        kept: (K,) int64, the units that run; None where all of them do.
    """

    @property
    def kept(self) -> Tensor | None:
        """See above."""

    def enter(self, projection: "PrunedProjection", states: Tensor) -> Tensor:
        """What a projection into the block gives for (..., D)."""

    def leave(self, projection: "PrunedProjection", states: Tensor) -> Tensor:
        """What the output projection gives for (..., C)."""


class PrunedProjection:
    """One projection of a block. Its :meth:`forward` stands in for the module's.

    Args:
        runner: the :class:`~pp_lightning.pruned.runner.BlockRunner` of the block, which says what is done with states.
        name: inside the block.
        module: a Linear, or anything else that maps the last dimension linearly: an adapter around a Linear, a
            quantised one.
        rows: which of its outputs belong to units; of the output projection, nothing.
        number: U.
        is_output: whether it leaves the block.
        repeats: how often each head of its output is repeated: keys and values, where single query heads of a group are
            pruned and each brings its own.
        head_size: d, of the heads that are repeated.
        is_linear: whether the module computes ``x W^T + b`` and nothing else.
        bare: whether the block has no module of its own, but begins with its first projection and ends with its last.
    """

    def __init__(
        self,
        runner: Any,
        name: str,
        module: nn.Module,
        rows: Sequence[Rows],
        number: int,
        *,
        is_output: bool,
        is_linear: bool,
        repeats: int = 1,
        head_size: int = 0,
        bare: bool = False,
    ) -> None:
        self.runner = runner
        self.name = name
        self.module: Any = module
        self.rows = tuple(rows)
        self.number = number
        self.is_output = is_output
        self.is_linear = is_linear
        self.repeats = repeats
        self.head_size = head_size
        self.bare = bare

    @property
    def matrix(self) -> Matrix:
        """The whole weight (out, in) and bias (out,)."""
        return Matrix(self.module.weight, self.module.bias)

    @property
    def is_sliced(self) -> bool:
        """Whether weights are sliced for it; other projections run whole and their output is."""
        return self.is_linear and self.repeats == 1 and (self.is_output or any(rows.width for rows in self.rows))

    def forward(self, states: Tensor) -> Tensor:
        """Stands in for the module's ``forward``."""
        runner = self.runner
        if self.bare and not self.is_output and runner.begin is not None:
            begun: Tensor = runner.begin(self, states)
            return begun
        run = runner.run
        if run is None:
            return self.stock(states)
        if not self.is_output:
            entered: Tensor = run.enter(self, states)
            return entered
        left: Tensor = run.leave(self, states)
        if self.bare:
            runner.run = None
        return left

    def stock(self, states: Tensor) -> Tensor:
        """What the module computes."""
        if self.is_linear:
            return linear(states, self.module.weight, self.module.bias)
        output: Tensor = run_stock(self.module, states)
        return output

    def whole(self, states: Tensor) -> Tensor:
        """The outputs of all units."""
        output = self.stock(states)
        if self.repeats == 1:
            return output
        return output.unflatten(-1, (-1, self.head_size)).repeat_interleave(self.repeats, -2).flatten(-2)

    def sliced(self, states: Tensor, weights: Slice, kept: Tensor) -> Tensor:
        """The outputs of the kept units (K,)."""
        if self.is_sliced:
            return linear(states, *weights[self.name])
        if self.repeats > 1:
            heads = self.stock(states).unflatten(-1, (-1, self.head_size))
            return heads.index_select(-2, kept // self.repeats).flatten(-2)
        return self.of_units(self.stock(states), kept)

    def sliced_output(self, states: Tensor, weights: Slice, kept: Tensor, restored: Tensor | None) -> Tensor:
        """The output matrix applied to the states (..., K * w) of the kept units."""
        if self.is_sliced:
            return linear(states, *weights[self.name])
        channels = self.module.in_features
        whole = states.new_zeros(*states.shape[:-1], channels)
        whole = whole.index_copy(-1, unit_channels(kept, channels // self.number), states)
        output = self.stock(whole)
        return output if restored is None else output + restored.to(output.dtype)

    def store_by_columns(self) -> None:
        """Store the output matrix so that the kept columns are copied whole. No value changes, only the strides."""
        self.module.weight.data = store_by_columns(self.module.weight.data)

    def store_by_rows(self) -> None:
        """Undo :meth:`store_by_columns`."""
        self.module.weight.data = self.module.weight.data.contiguous()

    def of_units(self, whole: Tensor, kept: Tensor) -> Tensor:
        """Outputs of all units (..., out) reduced to those of the kept ones."""
        if self.repeats > 1:
            return whole.unflatten(-1, (-1, self.head_size)).index_select(-2, kept).flatten(-2)
        if not any(rows.width for rows in self.rows):
            return whole
        found = []
        for start, number, width in self.rows:
            own = whole if len(self.rows) == 1 else whole.narrow(-1, start, number)
            found.append(own if not width else own.unflatten(-1, (-1, width)).index_select(-2, kept).flatten(-2))
        return found[0] if len(found) == 1 else torch.cat(found, -1)
