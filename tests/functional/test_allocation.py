import pytest
import torch

from pp_lightning.functional.allocation import Removable, allocate, floor_count, relative_output_losses


def naive_allocation(blocks, flops):
    """The next step that loses least for each FLOP, one after the other, looked for from scratch each time."""
    alive = [sorted(block.losses.tolist()) for block in blocks]
    closed = set()
    while len(closed) < len(blocks):
        prices = {}
        for index, block in enumerate(blocks):
            units = (len(alive[index]) % block.step) or block.step
            if index not in closed and len(alive[index]) - units >= block.floor:
                prices[index] = (sum(alive[index][:units]) / (units * block.unit_flops), units)
            else:
                closed.add(index)
        if prices:
            index = min(prices, key=lambda i: (prices[i][0], i))
            units = prices[index][1]
            if units * blocks[index].unit_flops > flops:
                closed.add(index)
            else:
                flops -= units * blocks[index].unit_flops
                alive[index] = alive[index][units:]
    return [len(rest) for rest in alive]


@pytest.mark.parametrize("flops", [0, 1, 300, 1000, 5000, 10**9])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_naive_loop(flops, seed):
    generator = torch.Generator().manual_seed(seed)
    blocks = [
        Removable(torch.rand(units, generator=generator) * scale, cost, step, floor)
        for units, scale, cost, step, floor in [(8, 3.0, 50, 1, 2), (64, 1.0, 7, 8, 16), (64, 0.1, 7, 8, 16)]
    ]
    keep = allocate(blocks, flops)
    assert keep == naive_allocation(blocks, flops)
    saved = sum((len(b.losses) - k) * b.unit_flops for b, k in zip(blocks, keep, strict=True))
    assert saved <= flops
    assert all(k >= b.floor for k, b in zip(keep, blocks, strict=True))


def test_what_matters_little_goes_first_and_not_below_the_floor():
    worthless, precious = (Removable(torch.full((16,), worth), 10, 4, 4) for worth in (0.01, 1.0))
    assert allocate([precious, worthless], 120) == [16, 4]
    assert allocate([precious, worthless], 240) == [4, 4]
    assert allocate([worthless, precious], 120) == [4, 16]


def test_price_is_per_flop():
    """The same loss for three times the FLOPs goes first."""
    dear, cheap = Removable(torch.ones(4), 30, 1, 1), Removable(torch.ones(4), 10, 1, 1)
    assert allocate([cheap, dear], 90) == [4, 1]


def test_counts_are_multiples_of_the_step():
    assert allocate([Removable(torch.rand(22), 1, 8, 8)], 7) == [16]  # six first, and one of eight is too much
    assert allocate([Removable(torch.rand(22), 1, 8, 8)], 14) == [8]


@pytest.mark.parametrize(
    ("units", "floor", "step", "expected"),
    [(8, 0.25, 1, 2), (704, 0.25, 64, 192), (704, 0.0, 64, 64), (8, 0.0, 1, 1), (100, 1.0, 64, 100), (20, 0.3, 1, 6)],
)
def test_floor_count(units, floor, step, expected):
    assert floor_count(units, floor, step) == expected


@pytest.mark.parametrize("centred", [False, True])
def test_relative_losses_equal_the_loop_over_tokens(centred):
    """All rows have all positions, so that a mean over tokens is one over rows and positions."""
    rows, positions, channels, width = 5, 3, 6, 2
    states, residual = torch.randn(rows, positions, channels).double() + 1, torch.rand(rows, positions).double() + 0.5
    weight = torch.randn(4, channels)
    mean = states.mean((0, 1)) if centred else torch.zeros(channels)
    found = relative_output_losses(
        weight,
        (states - mean).square().mean(0).float(),
        residual.mean(0).float(),
        torch.full((positions,), float(rows)),
        width,
    )
    expected = torch.zeros(channels // width, dtype=torch.float64)
    for t in range(positions):
        for b in range(rows):
            for c in range(channels):
                share = (states[b, t, c] - mean[c]) ** 2 / residual[:, t].mean() / (rows * positions)
                expected[c // width] += share * weight[:, c].double().square().sum()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


def test_a_position_never_seen_counts_for_nothing():
    squares, residual, counts = torch.rand(3, 4), torch.tensor([2.0, 0.0, 4.0]), torch.tensor([5.0, 0.0, 5.0])
    losses = relative_output_losses(torch.ones(2, 4), squares, residual, counts, 1)
    torch.testing.assert_close(losses, 2 * (squares[0] / 2 + squares[2] / 4) / 2)
