"""LoRA-guided importance: gradients of a weight, guessed from its adapter's alone (LoRAPrune, arXiv 2305.18403)."""

import torch
from torch import Tensor

_ROWS_AT_ONCE = 256


def lora_gradient(down: Tensor, up: Tensor, down_gradient: Tensor, up_gradient: Tensor) -> Tensor:
    """The gradient estimate ``gB A + B gA - gB gA`` of rows of a weight: what one unit step would do to ``B A``.

    Args:
        down: A, (r, in).
        up: B, (out, r); any rows of it.
        down_gradient: gA, (r, in).
        up_gradient: gB, (out, r); the same rows.

    Returns:
        (out, in).
    """
    return up_gradient @ (down - down_gradient) + up @ down_gradient


def lora_importance(
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    down_gradient: Tensor,
    up_gradient: Tensor,
    scale: float,
    *,
    of_outputs: bool,
) -> Tensor:
    """``sum |g (W + c B A)|`` over each output (row) or input (column), with g from :func:`lora_gradient`.

    No matrix of the weight's size is ever made: the rows are taken some at a time.

    Args:
        weight: W, (out, in) of any dtype.
        down: A, (r, in).
        up: B, (out, r).
        down_gradient: gA, (r, in).
        up_gradient: gB, (out, r).
        scale: c, alpha over rank.
        of_outputs: of the rows, else of the columns.

    Returns:
        (out,) or (in,) float32.
    """
    down, up, down_gradient, up_gradient = (t.detach().float() for t in (down, up, down_gradient, up_gradient))
    rows, total = [], torch.zeros(weight.shape[1], dtype=torch.float32, device=weight.device)
    for start in range(0, weight.shape[0], _ROWS_AT_ONCE):
        some = slice(start, start + _ROWS_AT_ONCE)
        whole = weight[some].detach().float() + scale * (up[some] @ down)
        elements = (lora_gradient(down, up[some], down_gradient, up_gradient[some]) * whole).abs()
        if of_outputs:
            rows.append(elements.sum(1))
        else:
            total += elements.sum(0)
    return torch.cat(rows) if of_outputs else total
