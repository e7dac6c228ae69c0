"""Probes that are drawn at random instead of ranked: what they show of a batch is then unbiased.

The samples are uniform numbers that the caller drew (see :func:`draw_samples`), so everything else here is a pure
function and traces into a static graph. Padding is never drawn: a padded batch draws among its real rows and tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pp_lightning.functional.budget import probe_rows, probe_tokens
from pp_lightning.functional.probe import Probe, largest, largest_valid, real_count

# (samples, count, eligible, valid_count) to indices (count,) int64 ascending and which are in use, (count,) bool.
# Without padding eligible and valid_count are None, and so is the second result: all are in use.
Draw = Callable[[Tensor, int, Tensor | None, Tensor | None], tuple[Tensor, Tensor | None]]


_MOST_BATCHES = 1_000_003  # with one seed before the samples of another come up
_SAMPLE_STEPS = 2**24  # a sample is a multiple of one over this


@dataclass(frozen=True)
class ScatteredProbe:
    """Single tokens from all over a batch, for a block that treats tokens one by one (an MLP).

    Attributes:
        rows: (n,) int64, ascending.
        tokens: (n,) int64, column indices.
        real: (1, n) bool, True where the place holds a real token; None where everything is real.
    """

    rows: Tensor
    tokens: Tensor
    real: Tensor | None = None

    def take(self, states: Tensor) -> Tensor:
        """The probe's part (1, n, ...) of a (B, S, ...) tensor."""
        return states[self.rows, self.tokens].unsqueeze(0)


def draw_samples(shape: tuple[int, ...], seed: int, batch: int) -> Tensor:
    """Uniform numbers in [0, 1), float32 on the CPU: a function of seed and batch number alone."""
    generator = torch.Generator().manual_seed(seed * _MOST_BATCHES + batch)  # of a seed 32 bits are used
    return torch.rand(shape, generator=generator, dtype=torch.float32)


def samples_needed(num_rows: int, num_tokens: int, row_count: int, token_count: int) -> int:
    """How many samples a probe of this many rows and tokens of a (B, S) batch takes, of whichever kind."""
    return max(num_rows + num_tokens, row_count * token_count)


def drawn_probe(
    samples: Tensor,
    shape: torch.Size,
    real: Tensor | None,
    row_ratio: float,
    token_ratio: float,
    draw: Draw,
    sizes: tuple[int, int] | None = None,
) -> Probe:
    """Rows and tokens, drawn independently of each other.

    Args:
        samples: (B + S or more,) float32 in [0, 1).
        shape: (B, S) of the batch.
        real: (B, S) bool, True at real tokens; None where there is no padding.
        row_ratio: fraction of rows in the probe.
        token_ratio: fraction of tokens in the probe.
        draw: :func:`at_random` or :func:`one_a_stratum`.
        sizes: rows and tokens that these ratios give for (B, S), where the caller has them.
    """
    num_rows, num_tokens = shape
    row_count, token_count = sizes or (probe_rows(num_rows, row_ratio), probe_tokens(num_tokens, token_ratio))
    row_samples, token_samples = samples[:num_rows], samples[num_rows : num_rows + num_tokens]
    if real is None:
        rows, _ = draw(row_samples, row_count, None, None)
        tokens, _ = draw(token_samples, token_count, None, None)
        return Probe(rows, tokens)
    real_rows, real_columns = real.any(1), real.any(0)
    rows, row_valid = draw(row_samples, row_count, real_rows, real_count(real_rows, row_ratio, minimum=1))
    tokens, token_valid = draw(
        token_samples, token_count, real_columns, real_count(real_columns, token_ratio, minimum=2)
    )
    assert row_valid is not None and token_valid is not None
    selected = real[rows[:, None], tokens[None, :]] & token_valid[None, :] & row_valid[:, None]
    return Probe(rows, tokens, selected, token_valid)


def scattered_probe(samples: Tensor, shape: torch.Size, real: Tensor | None, count: int) -> ScatteredProbe:
    """Single tokens, one from each of ``count`` equal stretches of the batch read row by row, each equally likely.

    Args:
        samples: (count or more,) float32 in [0, 1).
        shape: (B, S) of the batch.
        real: (B, S) bool, True at real tokens; None where there is no padding.
        count: n, at most B * S.
    """
    num_tokens = shape[1]
    flat = None if real is None else real.flatten()
    valid_count = None if flat is None else flat.sum().clamp(max=count)
    places, valid = _strata(samples[:count], shape.numel(), flat, valid_count)
    return ScatteredProbe(places // num_tokens, places % num_tokens, None if valid is None else valid[None])


def at_random(
    samples: Tensor, count: int, eligible: Tensor | None, valid_count: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """A :data:`Draw`: every set of ``count`` places is equally likely.

    Args:
        samples: (N,) float32.
        count: places to draw.
        eligible: (N,) bool, or None for all.
        valid_count: 0-d int64, how many are to be in use of a draw among eligible places.
    """
    if eligible is None or valid_count is None:
        return largest(samples, count), None
    return largest_valid(samples, eligible, count, valid_count)


def one_a_stratum(
    samples: Tensor, count: int, eligible: Tensor | None, valid_count: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """A :data:`Draw`: one place from each of ``count`` equal stretches, so that no part of the batch is left out.

    Every place is equally likely. Where ``count`` does not divide the number of places, stretches differ by one place
    in length, and places in shorter ones would come up more often: then the first stretch begins anywhere, and the
    places are a circle.
    """
    return _strata(samples[:count], len(samples), eligible, valid_count)


def _strata(
    samples: Tensor, num_places: int, eligible: Tensor | None, valid_count: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    count = len(samples)
    edges = torch.arange(count + 1, device=samples.device)
    if eligible is None or valid_count is None:
        return _within(edges * num_places // count, samples, num_places).sort().values, None
    number = eligible.sum().clamp(min=1)
    edges = edges * number // valid_count.clamp(min=1)
    in_use = torch.arange(count, device=samples.device) < valid_count
    eligible_first = (~eligible).int().argsort(stable=True)
    places = eligible_first[_within(edges, samples, number)]
    ascending = torch.where(in_use, places, num_places).sort().values
    return ascending.clamp(max=num_places - 1), in_use


def _within(edges: Tensor, samples: Tensor, number: Tensor | int) -> Tensor:
    """One whole number below ``number`` from each stretch between edges (count + 1,), as its sample (count,) says."""
    sizes = edges.diff()
    inside = edges[:-1] + (samples * sizes).long()
    # The fraction of a sum of samples is independent of each of them, so that none is needed for the beginning alone.
    beginning = (samples * _SAMPLE_STEPS).long().sum() % _SAMPLE_STEPS * number // _SAMPLE_STEPS
    uneven = sizes.amax() > sizes.amin()
    return (inside + torch.where(uneven, beginning, 0)) % number
