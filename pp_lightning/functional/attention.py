"""Attention on tensors: heads, rotary positions, and scaled dot products by torch's own kernels."""

import torch
from torch import Tensor
from torch.nn import functional as F

_LARGEST_HEAD_OF_FLASH = 256


def split_heads(states: Tensor, head_size: int) -> Tensor:
    """(B, S, H * d) to (B, H, S, d)."""
    return states.unflatten(-1, (-1, head_size)).transpose(1, 2)


def join_heads(states: Tensor) -> Tensor:
    """(B, H, S, d) to (B, S, H * d)."""
    return states.transpose(1, 2).flatten(2)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of (B, H, S, d) with cos and sin (B or 1, S, d), halves rotated (LLaMA's layout)."""
    first, second = states.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return states * cos.unsqueeze(1) + turned * sin.unsqueeze(1)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Scaled dot-product attention.

    Args:
        query: (B, Q, S, d).
        key: (B, K, T, d); Q is a multiple of K, and query head q reads key head ``q // (Q / K)``.
        value: like ``key``.
        mask: (B or 1, 1, S, T), bool (True = may attend) or additive; None is causal (S = T) or, with one query, none.
        scale: factor on the products.
    """
    # Two ifs instead of one "and" and one "!=": traced with dynamic sizes, these would give no bools.
    causal, grouped = mask is None, False
    if query.shape[2] == 1:
        causal = False
    if query.shape[1] != key.shape[1]:
        grouped = True
    if grouped and not _groups_heads_itself(key, mask):
        queries_per_key = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(queries_per_key, dim=1) for states in (key, value))
        grouped = False
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def _groups_heads_itself(key: Tensor, mask: Tensor | None) -> bool:
    """Whether a fast kernel takes fewer key than query heads.

    On accelerators only flash attention does, which takes neither masks nor large heads; anything else would fall to
    the kernel that writes down all scores.
    """
    return key.device.type == "cpu" or (mask is None and key.shape[-1] <= _LARGEST_HEAD_OF_FLASH)
