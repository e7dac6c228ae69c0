import pytest
import torch

from pp_lightning.functional.draws import (
    at_random,
    draw_samples,
    drawn_probe,
    one_a_stratum,
    samples_needed,
    scattered_probe,
)

DRAWS = {"at_random": at_random, "one_a_stratum": one_a_stratum}
SHAPE = torch.Size((20, 64))


def samples(seed, count=32):
    return draw_samples((samples_needed(*SHAPE, 1, count),), seed, 0)


def test_random_samples_depend_on_seed_and_batch_and_on_nothing_else():
    torch.manual_seed(1)
    first = draw_samples((50,), 3, 7)
    torch.rand(3)
    assert torch.equal(first, draw_samples((50,), 3, 7))
    assert not torch.equal(first, draw_samples((50,), 3, 8))
    assert not torch.equal(first, draw_samples((50,), 4, 7))
    assert first.min() >= 0 and first.max() < 1


@pytest.mark.parametrize("draw", DRAWS)
def test_sizes_order_and_range(draw):
    for seed in range(20):
        probe = drawn_probe(samples(seed), SHAPE, None, 0.1, 0.25, DRAWS[draw])
        assert (len(probe.rows), len(probe.tokens)) == (2, 16)
        assert probe.rows.diff().min() > 0 and probe.tokens.diff().min() > 0
        assert probe.rows.max() < 20 and probe.tokens.max() < 64
        assert probe.real is None


@pytest.mark.parametrize("draw", DRAWS)
def test_every_place_is_as_likely_as_any_other(draw):
    """2000 draws of 16 from 64: a place comes up 500 times, give or take 19 (one standard deviation)."""
    times = torch.zeros(64)
    for seed in range(2000):
        times[drawn_probe(samples(seed), SHAPE, None, 0.1, 0.25, DRAWS[draw]).tokens] += 1
    assert times.sum() == 2000 * 16
    assert (times - 500).abs().max() < 5 * 19.4


def test_strata_leave_no_part_out_and_chance_does():
    """Of any 10 places out of 30, drawn one a stratum, each third has one."""
    gaps = {name: 0 for name in DRAWS}
    for seed in range(50):
        for name, draw in DRAWS.items():
            drawn, _ = draw(draw_samples((30,), seed, 0), 10, None, None)
            gaps[name] += len(set((drawn // 3).tolist())) < 10
    assert gaps == {"at_random": 50, "one_a_stratum": 0}


@pytest.mark.parametrize(("places", "count"), [(1, 1), (5, 5), (7, 3), (64, 16), (100, 33), (33, 32)])
@pytest.mark.parametrize("draw", DRAWS)
def test_any_number_of_any_number(places, count, draw):
    for seed in range(20):
        drawn, valid = DRAWS[draw](draw_samples((places,), seed, 1), count, None, None)
        assert valid is None
        assert len(set(drawn.tolist())) == count and drawn.max() < places


def padded_batch():
    real = torch.zeros(SHAPE, dtype=torch.bool)
    for row, length in enumerate([40, 7, 22, 1, 33]):
        real[row, 64 - length :] = True  # rows 5 to 19 are padding alone, as are columns 0 to 23
    return real


@pytest.mark.parametrize("draw", DRAWS)
def test_padding_is_never_drawn(draw):
    real = padded_batch()
    for seed in range(50):
        probe = drawn_probe(samples(seed), SHAPE, real, 0.4, 0.25, DRAWS[draw])
        # as many as the batch without its padding would have: 2 of 5 rows, 10 of 40 columns
        assert probe.real_tokens.sum() == 10
        assert probe.tokens[probe.real_tokens].min() >= 24
        assert len(set(probe.tokens[probe.real_tokens].tolist())) == 10
        assert probe.real.any(1).sum() <= 2
        rows, columns = probe.real.nonzero().unbind(1)
        assert real[probe.rows[rows], probe.tokens[columns]].all()


def test_scattered_places_are_real_distinct_and_spread():
    real = padded_batch()
    for seed in range(20):
        whole = scattered_probe(samples(seed), SHAPE, None, 32)
        assert ((whole.rows * 64 + whole.tokens) // 40).tolist() == list(range(32))
        part = scattered_probe(samples(seed), SHAPE, real, 32)
        assert part.real.all()
        places = set(zip(part.rows.tolist(), part.tokens.tolist(), strict=True))
        assert len(places) == 32 and all(real[place] for place in places)
        few = scattered_probe(samples(seed, 110), SHAPE, real, 110)  # there are 103
        assert few.real.sum() == 103


def test_scattered_probe_takes_what_it_names():
    states = torch.randn(*SHAPE, 3)
    probe = scattered_probe(samples(0), SHAPE, None, 8)
    taken = probe.take(states)
    assert taken.shape == (1, 8, 3)
    for i, (row, token) in enumerate(zip(probe.rows.tolist(), probe.tokens.tolist(), strict=True)):
        assert torch.equal(taken[0, i], states[row, token])


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("real", [None, padded_batch()], ids=["whole", "padded"])
def test_traces_into_one_graph(draw, real):
    def both(samples):
        probe = drawn_probe(samples, SHAPE, real, 0.1, 0.25, DRAWS[draw])
        return probe.rows, probe.tokens, scattered_probe(samples, SHAPE, real, 32).rows

    compiled = torch.compile(both, fullgraph=True, backend="eager")
    assert all(torch.equal(a, b) for a, b in zip(both(samples(0)), compiled(samples(0)), strict=True))


@pytest.mark.parametrize(("places", "count"), [(7, 2), (10, 3), (10, 7), (64, 60), (20, 3)])
@pytest.mark.parametrize("padded", [False, True])
def test_every_place_is_as_likely_as_any_other_where_stretches_are_uneven(places, count, padded):
    """4000 draws; a place comes up within five standard deviations of its share, whatever the stretch it is in."""
    real = torch.ones(places + 2 * padded, dtype=torch.bool)
    if padded:
        real[[0, 5]] = False
    times = torch.zeros(len(real))
    for seed in range(4000):
        sample = draw_samples((len(real),), seed, 0)
        given = (real, torch.tensor(count)) if padded else (None, None)
        drawn, _ = one_a_stratum(sample, count, *given)
        assert (drawn.diff() > 0).all()
        times[drawn] += 1
    share = count / places
    assert times[~real].sum() == 0
    assert (times[real] - 4000 * share).abs().max() < 5 * (4000 * share * (1 - share)) ** 0.5


def test_every_scattered_token_is_as_likely_as_any_other():
    times = torch.zeros(5, 7)
    for seed in range(4000):
        probe = scattered_probe(draw_samples((12,), seed, 0), torch.Size((5, 7)), None, 12)
        times[probe.rows, probe.tokens] += 1
    share = 12 / 35
    assert (times - 4000 * share).abs().max() < 5 * (4000 * share * (1 - share)) ** 0.5
