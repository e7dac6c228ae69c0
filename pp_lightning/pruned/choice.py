"""What a block runs a batch on, and how."""

from typing import NamedTuple

from torch import Tensor


class Choice(NamedTuple):
    """What a block runs a batch on.

    Attributes:
        kept: (K,) int64, ascending, the units that stay.
        restored: (D,) float32, what the others contribute on average, added to the output; None adds nothing.
        mean: (C,) float32, what :attr:`restored` is yet to be made from; None where it is made.
    """

    kept: Tensor
    restored: Tensor | None = None
    mean: Tensor | None = None


class ExecutionPlan(NamedTuple):
    """How a block runs a batch: Python constants, known from the batch's shape.

    Attributes:
        probe_sizes: rows and tokens of the probe.
        shares: whether probe and batch come from one projection with all weights.
        leaves: whether the slices are left where decoding finds them.
    """

    probe_sizes: tuple[int, int]
    shares: bool
    leaves: bool
