import math
from fractions import Fraction

import pytest
import torch

from pp_lightning.functional.probe import FEW_TOKENS, Probe, select_probe, token_norms


def naive_probe(importance, real, row_ratio, token_ratio):
    """The rows and columns that are selected, pads left out of everything."""
    n, real = importance.double().tolist(), real.tolist()
    columns = [t for t in range(len(n[0])) if any(row[t] for row in real)]
    rows = [b for b in range(len(n)) if any(real[b])]
    count = min(len(columns), max(2, math.ceil(Fraction(str(token_ratio)) * len(columns))))
    by_column = {t: math.sqrt(sum(n[b][t] ** 2 for b in rows if real[b][t])) for t in columns}
    tokens = sorted(sorted(columns, key=lambda t: -by_column[t])[:count])
    if len(tokens) <= 10:
        tokens[0] = columns[0]
    by_row = {b: math.sqrt(sum(n[b][t] ** 2 for t in tokens if real[b][t])) for b in rows}
    row_count = min(len(rows), max(1, math.ceil(Fraction(str(row_ratio)) * len(rows))))
    return sorted(sorted(rows, key=lambda b: -by_row[b])[:row_count]), tokens


def selected(probe: Probe) -> set[tuple[int, int]]:
    """The (row, column) places of a probe that count."""
    pairs = {(b, t) for b in range(len(probe.rows)) for t in range(len(probe.tokens))}
    if probe.real is not None:
        pairs = {(b, t) for b, t in pairs if probe.real[b, t]}
    return {(probe.rows[b].item(), probe.tokens[t].item()) for b, t in pairs}


def test_token_norms_in_float32():
    states = torch.randn(2, 3, 5).half()
    norms = token_norms(states)
    assert norms.dtype == torch.float32
    expected = [[math.sqrt(sum(x * x for x in token)) for token in row] for row in states.double().tolist()]
    torch.testing.assert_close(norms, torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 2), (5, 17), (20, 64), (41, 33)])
@pytest.mark.parametrize(("row_ratio", "token_ratio"), [(0.05, 0.5), (0.3, 0.1), (1.0, 1.0), (0.5, 0.01)])
def test_selection_equals_the_naive_loop(shape, row_ratio, token_ratio):
    importance = torch.rand(shape) + 0.1
    probe = select_probe(importance, None, row_ratio, token_ratio)
    rows, tokens = naive_probe(importance, torch.ones(shape, dtype=torch.bool), row_ratio, token_ratio)
    assert probe.rows.tolist() == rows
    assert probe.tokens.tolist() == tokens
    assert probe.real is None


def test_tokens_come_first_and_rows_are_ranked_on_them_alone():
    importance = torch.full((3, 40), 0.1)
    importance[:, 20:] = 1.0
    importance[1, 20:] = 1.1  # the best row on the tokens that win
    importance[2, :20] = 1.0  # the best row over all tokens, but these lose
    probe = select_probe(importance, None, row_ratio=0.05, token_ratio=0.5)
    assert probe.tokens.tolist() == list(range(20, 40))
    assert probe.rows.tolist() == [1]


def test_few_tokens_always_include_the_start():
    importance = torch.arange(1.0, 21.0)[None, :]
    assert select_probe(importance, None, 1.0, 0.5).tokens.tolist() == [0, *range(11, 20)]  # 10 tokens: 10 makes way
    assert select_probe(importance, None, 1.0, 0.55).tokens.tolist() == list(range(9, 20))  # 11: no rule
    assert FEW_TOKENS == 10


def test_few_tokens_include_the_first_real_column():
    importance = torch.arange(1.0, 21.0).repeat(2, 1)
    real = torch.ones(2, 20, dtype=torch.bool)
    real[0, :6] = False
    real[1, :4] = False
    probe = select_probe(importance, real, 1.0, 0.5)  # 16 real columns, 8 tokens
    assert probe.tokens[probe.real_tokens].tolist() == [4, *range(13, 20)]
    assert (0, 4) not in selected(probe)  # row 0 is padding there
    assert (1, 4) in selected(probe)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ratios", [(0.05, 0.5), (0.4, 0.3), (1.0, 1.0)])
def test_padded_selection_equals_the_naive_loop(seed, ratios):
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(9, 31, generator=generator) + 0.1
    lengths = torch.randint(1, 28, (9,), generator=generator)
    starts = torch.randint(0, 4, (9,), generator=generator)
    columns = torch.arange(31)
    real = (columns >= starts[:, None]) & (columns < (starts + lengths)[:, None])
    importance[~real] = 100.0  # never to be counted
    rows, tokens = naive_probe(importance, real, *ratios)
    probe = select_probe(importance, real, *ratios)
    assert selected(probe) == {(b, t) for b in rows for t in tokens if real[b, t]}
    assert probe.tokens[probe.real_tokens].tolist() == tokens
    assert probe.tokens.tolist() == sorted(probe.tokens.tolist())


@pytest.mark.parametrize(
    ("left", "right", "rows_above", "rows_below"),
    [(3, 0, 0, 0), (0, 5, 0, 0), (9, 4, 0, 0), (2, 2, 3, 1), (0, 0, 0, 30)],
)
@pytest.mark.parametrize("tokens", [12, 40])  # with and without the rule for few tokens
def test_padding_around_a_batch_does_not_change_its_probe(left, right, rows_above, rows_below, tokens):
    importance = torch.rand(7, tokens) + 0.1
    alone = select_probe(importance, None, 0.2, 0.5)
    padding = (left, right, rows_above, rows_below)
    wide = torch.nn.functional.pad(importance, padding, value=50.0)
    real = torch.nn.functional.pad(torch.ones(7, tokens, dtype=torch.bool), padding, value=False)
    probe = select_probe(wide, real, 0.2, 0.5)
    assert selected(probe) == {(b + rows_above, t + left) for b, t in selected(alone)}
    assert int(probe.real_tokens.sum()) == len(alone.tokens)


def test_shapes_depend_on_the_batch_shape_alone():
    importance = torch.rand(6, 20)
    real = torch.zeros(6, 20, dtype=torch.bool)
    real[0, 3:5] = True
    probe = select_probe(importance, real, 0.5, 0.5)
    assert (len(probe.rows), len(probe.tokens)) == (3, 10)
    assert selected(probe) == {(0, 3), (0, 4)}


def test_take():
    states = torch.randn(4, 6, 3)
    part = Probe(torch.tensor([1, 3]), torch.tensor([0, 2, 5])).take(states)
    assert part.shape == (2, 3, 3)
    assert torch.equal(part[1, 2], states[3, 5])
