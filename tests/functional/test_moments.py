import math

import pytest
import torch

from pp_lightning.functional import moments
from pp_lightning.functional.moments import (
    TokenPositions,
    fuse,
    fused_energy,
    placed_count,
    placed_second_moment,
    placed_sum,
    positions_held,
    second_moment,
    sum_of_squares,
    update_history_,
)
from pp_lightning.functional.probe import Probe


def places_of(real: torch.Tensor, num_positions: int) -> TokenPositions:
    return TokenPositions(real.long().cumsum(1) - 1, real, num_positions)


def naive_moment(states, places):
    """Mean of x^2 over the real tokens at each position, in lists."""
    total = [[0.0] * states.shape[2] for _ in range(places.num_positions)]
    count = [0] * places.num_positions
    for b in range(states.shape[0]):
        for t in range(states.shape[1]):
            if places.real[b, t]:
                position = int(places.positions[b, t])
                count[position] += 1
                for c in range(states.shape[2]):
                    total[position][c] += float(states[b, t, c]) ** 2
    return torch.tensor([[x / max(n, 1) for x in row] for row, n in zip(total, count, strict=True)]), torch.tensor(
        count
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_second_moment_equals_the_naive_loop(dtype):
    states = torch.randn(3, 4, 5).to(dtype)
    everywhere = TokenPositions(torch.arange(4).repeat(3, 1), torch.ones(3, 4, dtype=torch.bool), 4)
    expected, _ = naive_moment(states, everywhere)
    assert second_moment(states).dtype == torch.float32
    torch.testing.assert_close(second_moment(states), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(sum_of_squares(states), 3 * expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_an_accelerator_sums_the_same_at_once(dtype):
    states = torch.randn(3, 4, 5).to(dtype)
    at_once = moments.sum_of_squares_at_once(states)
    assert at_once.dtype == torch.float32
    torch.testing.assert_close(at_once, moments.sum_of_squares(states), rtol=1e-5, atol=1e-7)
    assert moments.sum_of_squares_at_once(torch.full((2, 1, 1), 60000.0, dtype=torch.float16)).isfinite().all()


def test_half_precision_squares_do_not_overflow():
    states = torch.full((2, 1, 1), 60000.0, dtype=torch.float16)
    torch.testing.assert_close(second_moment(states), torch.full((1, 1), float(states[0, 0, 0]) ** 2))


def test_placed_moment_equals_the_naive_loop():
    states = torch.randn(4, 6, 3)
    real = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]]).bool()
    states[~real] = float("nan")  # pads may hold anything
    places = places_of(real, 7)
    moment, count = placed_second_moment(states, places)
    expected, expected_count = naive_moment(states, places)
    torch.testing.assert_close(moment, expected, rtol=1e-6, atol=1e-7)
    assert count.tolist() == expected_count.tolist() == [3, 3, 3, 2, 1, 0, 0]
    assert (moment[5:] == 0).all()  # positions that no row has
    assert torch.equal(placed_count(places), count)
    torch.testing.assert_close(placed_sum(states, places)[0], states[0, 2] + states[1, 0] + states[3, 0])


@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 2), (4, 1)])
def test_padded_moment_equals_the_moment_without_padding(left, right):
    states = torch.randn(5, 8, 6)
    wide = torch.nn.functional.pad(states, (0, 0, left, right), value=float("nan"))
    real = torch.nn.functional.pad(torch.ones(5, 8, dtype=torch.bool), (left, right), value=False)
    moment, count = placed_second_moment(wide, places_of(real, 8))
    torch.testing.assert_close(moment, second_moment(states), rtol=1e-6, atol=1e-7)
    assert count.tolist() == [5.0] * 8


def test_positions_held():
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    places = places_of(real, 5)
    # column 2 is position 0 in row 0 and position 2 in row 1; column 4 is position 2; column 0 is left out
    held = positions_held(places, torch.tensor([0, 2, 4]), torch.tensor([False, True, True]))
    assert held.tolist() == [True, False, True, False, False]


def test_fuse_by_importance():
    probe, history = torch.rand(4, 5) + 0.01, torch.rand(4, 5) + 0.01
    expected = torch.empty(4, 5)
    for i in range(4):
        for j in range(5):
            p, h = probe[i, j].item(), history[i, j].item()
            w = p / (p + h)
            expected[i, j] = w * p + (1 - w) * h
    torch.testing.assert_close(fuse(probe, history, None), expected, rtol=1e-6, atol=0)


def test_fuse_of_zeros():
    probe, history = torch.tensor([0.0, 0.0, 2.0]), torch.tensor([0.0, 3.0, 0.0])
    assert fuse(probe, history, None).tolist() == [0.0, 3.0, 2.0]  # zero with zero is zero, not NaN


def test_fuse_does_not_skew_small_values():
    probe, history = torch.tensor([1e-9]), torch.tensor([3e-9])
    torch.testing.assert_close(fuse(probe, history, None), torch.tensor([2.5e-9]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_fusion_weight_is_the_weight_of_the_probe(weight):
    probe, history = torch.rand(3, 4), torch.rand(3, 4)
    fused = fuse(probe, history, weight)
    torch.testing.assert_close(fused, weight * probe + (1 - weight) * history)
    if weight in (0.0, 1.0):
        assert torch.equal(fused, probe if weight else history)


@pytest.mark.parametrize("weight", [None, 0.6])
@pytest.mark.parametrize("probed", [False, True])
def test_fused_energy_equals_the_naive_loop_whatever_the_length(weight, probed):
    states, history = torch.randn(3, 70, 5), torch.rand(90, 5)
    tokens = torch.arange(70).flip(0)[::2].flip(0) if probed else torch.arange(70)
    probe = Probe(torch.arange(3), tokens) if probed else None
    part = states[:, tokens]
    expected = torch.zeros(5, dtype=torch.float64)
    for place, position in enumerate(tokens):
        for c in range(5):
            p = sum(float(row[place, c]) ** 2 for row in part) / 3
            h = float(history[position, c])
            w = p / (p + h) if weight is None else weight
            expected[c] += w * p + (1 - w) * h
    found, count = fused_energy(part, probe, None, history, weight)
    assert count == len(tokens)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_history_moves_in_place_at_kept_channels_and_present_positions_only():
    history = torch.rand(6, 5)
    before = history.clone()
    kept, present = torch.tensor([1, 3]), torch.tensor([True, False, True, True])
    moment = torch.rand(4, 2)
    update_history_(history, moment, kept, 0.99, present)
    for p in range(6):
        for c in range(5):
            if p < 4 and c in (1, 3) and present[p]:
                expected = 0.99 * before[p, c].item() + 0.01 * moment[p, [1, 3].index(c)].item()
                assert math.isclose(history[p, c].item(), expected, rel_tol=1e-6)
                assert history[p, c] != before[p, c]
            else:
                assert history[p, c] == before[p, c]


def test_momentum_one_keeps_the_history():
    history = torch.rand(3, 4)
    before = history.clone()
    update_history_(history, torch.rand(3, 4), torch.arange(4), 1.0, None)
    assert torch.equal(history, before)
