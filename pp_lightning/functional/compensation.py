"""What pruned channels contribute on average, put back as one vector.

A block's output loses ``sum_c W[:, c] x_c`` over its pruned channels c. The part of it that is the same for all tokens,
``W[:, pruned] mu[pruned]``, costs one matrix-vector product a batch to restore. FLAP does so once, with means of the
calibration set; here the means may be those of the very batch, as its probe shows them.
"""

import torch
from torch import Tensor


def channel_mean(states: Tensor, real: Tensor | None) -> Tensor:
    """Mean of each channel over all real tokens: (b, s, C) of any dtype to (C,) float32; 0 without a real token.

    Args:
        states: (b, s, C).
        real: (b, s) bool; None where everything is real.
    """
    flat = states.flatten(0, 1)
    if real is None:
        return flat.mean(0, dtype=torch.float32)
    kept = real.flatten()
    total = torch.where(kept[:, None], flat.float(), 0.0).sum(0)  # not a product: padding may hold anything, even NaN
    return total / kept.sum().clamp(min=1)


def restored_mean(weight: Tensor, mean: Tensor, kept_channels: Tensor) -> Tensor:
    """``W[:, pruned] mu[pruned]``: what the pruned channels contribute on average, (D,) float32.

    Args:
        weight: output matrix (D, C) of any dtype.
        mean: mu, (C,) float32.
        kept_channels: (K,) int64, the channels that are not pruned.
    """
    removed = mean.index_fill(0, kept_channels, 0.0)
    vector = removed.to(weight.dtype)  # and no float32 copy of the weight
    return torch.nn.functional.linear(vector[None], weight.detach())[0].float()


def update_mean_(mean: Tensor, batch_mean: Tensor, kept: Tensor, momentum: float, finite: Tensor) -> None:
    """Move a running mean (C,) towards a batch's, in place, in the kept channels: ``M = m M + (1 - m) mu``.

    Args:
        mean: (C,) float32.
        batch_mean: (K,) float32, of the kept channels.
        kept: (K,) int64.
        momentum: m.
        finite: bool scalar; False leaves the mean as it is.
    """
    old = mean.index_select(0, kept)
    new = torch.where(finite, torch.lerp(batch_mean, old, momentum), old)
    mean.index_copy_(0, kept, new)
