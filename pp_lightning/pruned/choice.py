"""What a block runs a batch on, and how."""

from typing import NamedTuple

from torch import Tensor


class Choice(NamedTuple):
    """What a block runs a batch on.

    Attributes:
        kept: (K,) int64, ascending, the units that stay.
        restored: (D,) float32, what the others contribute on average, added to the output; None adds nothing.
    """

    kept: Tensor
    restored: Tensor | None = None


class HowToRun(NamedTuple):
    """How a batch is run: Python constants, known from its shape.

    Attributes:
        keep: K, the units that stay.
        shares: whether probe and batch come from one projection.
        leaves: whether the slices are left where decoding will find them.
    """

    keep: int
    shares: bool
    leaves: bool = False
