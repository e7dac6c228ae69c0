import math

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from pp_lightning.functional import attention
from pp_lightning.functional.attention import attend, join_heads, rotate, split_heads


def naive_attention(query, key, value, allowed, scale):
    """One row and head at a time; query head q reads key head q // (Q / K)."""
    result = torch.zeros_like(query)
    repeat = query.shape[1] // key.shape[1]
    for b in range(query.shape[0]):
        for q in range(query.shape[1]):
            for s in range(query.shape[2]):
                seen = [t for t in range(key.shape[2]) if allowed[b, s, t]]
                products = [float(query[b, q, s] @ key[b, q // repeat, t]) * scale for t in seen]
                weights = [math.exp(p - max(products)) for p in products]
                for t, weight in zip(seen, weights, strict=True):
                    result[b, q, s] += weight / sum(weights) * value[b, q // repeat, t]
    return result


def test_heads_are_consecutive_channels():
    states = torch.randn(2, 3, 8)
    heads = split_heads(states, 4)
    assert heads.shape == (2, 2, 3, 4)
    assert torch.equal(heads[1, 1, 2], states[1, 2, 4:])
    assert torch.equal(join_heads(heads), states)


def test_rotation_is_that_of_transformers():
    query, key = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    angles = torch.rand(2, 5, 4).repeat(1, 1, 2)
    expected = apply_rotary_pos_emb(query, key, angles.cos(), angles.sin())
    assert torch.equal(rotate(query, angles.cos(), angles.sin()), expected[0])
    assert torch.equal(rotate(key, angles.cos(), angles.sin()), expected[1])


def test_rotation_is_a_rotation_of_pairs():
    angle = 0.3
    states = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    cos, sin = torch.full((1, 1, 4), math.cos(angle)), torch.full((1, 1, 4), math.sin(angle))
    turned = rotate(states, cos, sin).flatten().tolist()
    for i, (x, y) in enumerate([(1.0, 3.0), (2.0, 4.0)]):
        z = complex(x, y) * complex(math.cos(angle), math.sin(angle))
        assert turned[i] == pytest.approx(z.real)
        assert turned[i + 2] == pytest.approx(z.imag)


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("kind", ["causal", "bool", "additive"])
def test_attention_equals_the_naive_loop(key_heads, kind):
    query, key, value = torch.randn(2, 4, 5, 3), torch.randn(2, key_heads, 5, 3), torch.randn(2, key_heads, 5, 3)
    allowed = torch.ones(2, 5, 5, dtype=torch.bool).tril()
    if kind != "causal":
        allowed[1, 1:, 0] = False  # row 1 starts with padding
    mask = {
        "causal": None,
        "bool": allowed[:, None],
        "additive": torch.zeros(2, 1, 5, 5).masked_fill(~allowed[:, None], torch.finfo(torch.float32).min),
    }[kind]
    found = attend(query, key, value, mask, scale=0.7)
    torch.testing.assert_close(found, naive_attention(query, key, value, allowed, 0.7), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("key_heads", [2, 1])
def test_keys_are_repeated_where_no_fast_kernel_groups_heads(monkeypatch, key_heads):
    query, key, value = torch.randn(2, 4, 5, 3), torch.randn(2, key_heads, 5, 3), torch.randn(2, key_heads, 5, 3)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    expected, asked = attend(query, key, value, mask, scale=0.7), []
    stock = torch.nn.functional.scaled_dot_product_attention

    def watched(*states, enable_gqa, **rest):
        asked.append((enable_gqa, states[1].shape[1]))
        return stock(*states, enable_gqa=enable_gqa, **rest)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    attend(query, key, value, mask, scale=0.7)
    monkeypatch.setattr(attention, "_groups_heads_itself", lambda key, mask: False)
    torch.testing.assert_close(attend(query, key, value, mask, scale=0.7), expected, rtol=1e-5, atol=1e-6)
    assert asked == [(True, key_heads), (False, 4)]


@pytest.mark.parametrize(
    ("device", "masked", "head_size", "itself"),
    [("cpu", True, 64, True), ("meta", False, 64, True), ("meta", True, 64, False), ("meta", False, 320, False)],
)
def test_flash_attention_takes_no_masks_and_no_large_heads(device, masked, head_size, itself):
    key = torch.empty(1, 1, 2, head_size, device=device)
    assert attention._groups_heads_itself(key, torch.empty(1, 1, 2, 2) if masked else None) == itself


def test_a_single_query_sees_every_key():
    query, key, value = torch.randn(1, 2, 1, 3), torch.randn(1, 2, 6, 3), torch.randn(1, 2, 6, 3)
    allowed = torch.ones(1, 1, 6, dtype=torch.bool)
    found = attend(query, key, value, None, scale=0.5)
    torch.testing.assert_close(found, naive_attention(query, key, value, allowed, 0.5), rtol=1e-5, atol=1e-6)
