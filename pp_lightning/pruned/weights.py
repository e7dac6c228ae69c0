"""What a block multiplies with: its projections, whole or sliced."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from pp_lightning.functional.linear import linear, wants_rows
from pp_lightning.functional.selection import take_rows


class Projection(NamedTuple):
    """Weight (out, in) and bias (out,) of a linear map, whole or sliced."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Weights:
    """A block's projections by role, whole (``kept`` is None) or reduced to the kept units (K,)."""

    projections: Mapping[str, Projection]
    kept: Tensor | None = None

    def restoring(self, vector: Tensor | None) -> "Weights":
        """The same with ``vector`` (D,) float32 added to the output's bias: it then costs nothing to add."""
        if vector is None:
            return self
        weight, bias = self.projections["output"]
        total = vector if bias is None else bias.float() + vector
        return Weights({**self.projections, "output": Projection(weight, total.to(weight.dtype))}, self.kept)

    def rows(self, role: str) -> Tensor:
        """The units' rows in memory, one unit after the other: the weight, of the output its transpose.

        Contiguous where the output is stored by columns, see :func:`store_by_columns`.
        """
        weight = self.projections[role].weight
        return weight.t() if role == "output" else weight

    def reduced(self, rows: Mapping[str, Tensor], kept: Tensor, widths: Mapping[str, int]) -> "Weights":
        """Reduced to some units.

        Args:
            rows: by role, (K * w, D), the units' own rows; what is not named stays whole.
            kept: (K,) int64, the units in the order of their rows.
            widths: by role, w, the rows of a unit.
        """
        projections = dict(self.projections)
        for role, own in rows.items():
            bias = self.projections[role].bias
            if role == "output":  # its bias belongs to what comes out
                projections[role] = Projection(own.t(), bias)
            else:
                own_bias = None if bias is None else take_rows(bias, kept, widths[role])
                projections[role] = Projection(own, own_bias)
        return Weights(projections, kept)

    def by_rows(self) -> "Weights":
        """The same, the output stored by rows where products want that."""
        weight, bias = self.projections["output"]
        if not wants_rows(weight):
            return self
        return Weights({**self.projections, "output": Projection(weight.contiguous(), bias)}, self.kept)

    def apply(self, role: str, states: Tensor) -> Tensor:
        """The linear map ``role`` of (..., in)."""
        return linear(states, *self.projections[role])
