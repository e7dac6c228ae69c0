"""Taylor importance: how much the loss would change without an element of a weight (LLM-Pruner).

All float32, larger means more important. A projection's weight is (out, in); a unit owns rows of the projections into a
block and columns of the output matrix.
"""

from enum import StrEnum

import torch
from torch import Tensor

_ROWS_AT_ONCE = 256


class Taylor(StrEnum):
    """Which terms of the expansion, and where the absolute value is taken.

    With weight w, gradient g of the mean loss, and a the mean over samples of the squared gradient of each one's loss.
    """

    VECTORIZE = "vectorize"  # |sum w g|: first order, of a whole row or column at once
    PARAM_FIRST = "param_first"  # sum |w g|
    PARAM_SECOND = "param_second"  # sum |w a w|
    PARAM_MIX = "param_mix"  # sum |w g - w a w / 2|

    @property
    def uses_gradient(self) -> bool:
        """Whether g enters."""
        return self is not Taylor.PARAM_SECOND

    @property
    def uses_squares(self) -> bool:
        """Whether a enters, which takes one backward pass a sample."""
        return self in (Taylor.PARAM_SECOND, Taylor.PARAM_MIX)


def taylor_importance(
    weight: Tensor, gradient: Tensor | None, squares: Tensor | None, taylor: Taylor, *, of_outputs: bool
) -> Tensor:
    """Importance of each output (row) or input (column) of a projection, without a float32 copy of its weight.

    Args:
        weight: (out, in) of any dtype.
        gradient: g, (out, in) of any dtype; None where ``taylor`` does not use it.
        squares: a, (out, in) of any dtype; None where ``taylor`` does not use it.
        taylor: the variant.
        of_outputs: of the rows, else of the columns.

    Returns:
        (out,) or (in,) float32.
    """
    rows, total = [], torch.zeros(weight.shape[1], dtype=torch.float32, device=weight.device)
    for start in range(0, weight.shape[0], _ROWS_AT_ONCE):
        some = slice(start, start + _ROWS_AT_ONCE)
        elements = _elements(
            weight[some].detach().float(),
            None if gradient is None else gradient[some].float(),
            None if squares is None else squares[some].float(),
            taylor,
        )
        elements = elements if taylor is Taylor.VECTORIZE else elements.abs()
        if of_outputs:
            rows.append(elements.sum(1))
        else:
            total += elements.sum(0)
    return (torch.cat(rows) if of_outputs else total).abs()


def _elements(weight: Tensor, gradient: Tensor | None, squares: Tensor | None, taylor: Taylor) -> Tensor:
    first = weight * gradient if taylor.uses_gradient and gradient is not None else None
    second = weight.square() * squares if taylor.uses_squares and squares is not None else None
    if first is not None and second is not None:
        return first - 0.5 * second
    result = first if first is not None else second
    assert result is not None, f"{taylor} lacks its gradient or its squares"
    return result
