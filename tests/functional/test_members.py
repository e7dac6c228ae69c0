import math

import pytest
import torch

from pp_lightning.functional.members import Reduction, normalised_unit_scores, reduced_unit_scores

HEADS, GROUPS, SIZE = 8, 2, 3  # query heads, key/value heads, head size
COMBINE = {Reduction.SUM: sum, Reduction.MEAN: lambda v: sum(v) / len(v), Reduction.MAX: max, Reduction.PROD: math.prod}


def members():
    query, output = torch.rand(HEADS * SIZE), torch.rand(HEADS * SIZE)
    return [query, torch.rand(GROUPS * SIZE), torch.rand(GROUPS * SIZE), output]


def group_of(head):
    """transformers puts consecutive query heads under one key/value head."""
    return head // (HEADS // GROUPS)


@pytest.mark.parametrize("reduction", Reduction)
def test_reduced_equals_the_naive_loop(reduction):
    given, expected = members(), [0.0] * GROUPS
    for group in range(GROUPS):
        for offset in range(SIZE):
            channel = []
            for member in given:
                heads = [h for h in range(HEADS) if group_of(h) == group] if len(member) == HEADS * SIZE else [group]
                channel.append(sum(member[head * SIZE + offset].item() for head in heads))
            expected[group] += COMBINE[reduction](channel)
    torch.testing.assert_close(reduced_unit_scores(given, GROUPS, reduction), torch.tensor(expected))


def test_query_heads_count_for_their_own_group():
    """The published fold gives a key/value head every G-th query head; ours gives it those that read it."""
    query = torch.zeros(HEADS * SIZE)
    query[(HEADS // GROUPS - 1) * SIZE] = 1.0  # the last query head of group 0
    rest = [torch.zeros(GROUPS * SIZE)] * 2 + [torch.zeros(HEADS * SIZE)]
    assert reduced_unit_scores([query, *rest], GROUPS, Reduction.SUM).tolist() == [1.0, 0.0]
    published = query.view(HEADS // GROUPS, GROUPS * SIZE).sum(0).view(GROUPS, SIZE).sum(1)
    assert published.tolist() == [0.0, 1.0]


def test_channels_without_groups():
    up, gate, output = (torch.rand(6) for _ in range(3))
    torch.testing.assert_close(reduced_unit_scores([up, gate, output], 6, Reduction.SUM), up + gate + output)
    torch.testing.assert_close(reduced_unit_scores([up, gate, output], 6, Reduction.PROD), up * gate * output)


def test_normalised_equals_the_naive_loop():
    given, expected = members(), [0.0] * GROUPS
    for member in given:
        width = len(member) // GROUPS
        sums = [sum(member[u * width : (u + 1) * width].tolist()) for u in range(GROUPS)]
        length = math.sqrt(sum(s * s for s in sums))
        expected = [e + s / (length + 1e-8) for e, s in zip(expected, sums, strict=True)]
    torch.testing.assert_close(normalised_unit_scores(given, GROUPS), torch.tensor(expected))
    scaled = [1000 * given[0], *given[1:]]
    torch.testing.assert_close(normalised_unit_scores(scaled, GROUPS), normalised_unit_scores(given, GROUPS))
    assert not torch.allclose(
        reduced_unit_scores(scaled, GROUPS, Reduction.SUM), reduced_unit_scores(given, GROUPS, Reduction.SUM)
    )
