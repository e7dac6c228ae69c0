import math

import pytest
import torch

from pp_lightning.functional.scores import (
    flap_column_scores,
    ppsp_unit_scores,
    ppsp_weight_norm,
    standardised,
    sum_over_units,
    wanda_column_scores,
)


@pytest.fixture
def weight():
    return torch.randn(7, 12) * 0.05


def test_weight_norm(weight):
    expected = [math.sqrt(sum(w**4 for w in weight[:, c].double().tolist())) for c in range(12)]
    torch.testing.assert_close(ppsp_weight_norm(weight), torch.tensor(expected), rtol=1e-6, atol=0)


def test_weight_norm_of_small_half_precision_weights():
    weight = torch.full((4, 1), 1e-3, dtype=torch.float16)  # W^4 underflows in float16
    norm = ppsp_weight_norm(weight)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm, torch.tensor([2 * float(weight[0, 0]) ** 2]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("width", [1, 3, 6])
def test_ppsp_is_the_joint_norm_over_a_units_columns(weight, width):
    energy = torch.rand(12)
    expected = []
    for unit in range(12 // width):
        columns = range(unit * width, (unit + 1) * width)
        summands = [(energy[c].item() * weight[i, c].item() ** 2) ** 2 for c in columns for i in range(7)]
        expected.append(math.sqrt(sum(summands)))
    found = ppsp_unit_scores(energy, ppsp_weight_norm(weight), width)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=0)


def test_wanda(weight):
    energy = torch.rand(12)
    expected = [sum(abs(w) for w in weight[:, c].tolist()) * math.sqrt(energy[c].item()) for c in range(12)]
    torch.testing.assert_close(wanda_column_scores(weight, energy), torch.tensor(expected), rtol=1e-6, atol=0)
    assert wanda_column_scores(weight.half(), energy).dtype == torch.float32


def test_flap(weight):
    samples = torch.randn(50, 12) + 3.0
    variance = samples.var(0, unbiased=False)
    expected = variance * torch.stack([weight[:, c].square().sum() for c in range(12)])
    torch.testing.assert_close(flap_column_scores(weight, variance), expected, rtol=1e-4, atol=0)
    assert flap_column_scores(weight.half(), variance).dtype == torch.float32


def test_standardised():
    columns = torch.rand(9)
    values = columns.double().tolist()
    mean = sum(values) / 9
    deviation = math.sqrt(sum((x - mean) ** 2 for x in values) / 8)
    expected = torch.tensor([(x - mean) / deviation for x in values])
    torch.testing.assert_close(standardised(columns), expected, rtol=1e-5, atol=1e-6)


def test_standardised_equal_columns():
    assert standardised(torch.full((4,), 2.0)).tolist() == [0.0] * 4


def test_sum_over_units():
    assert sum_over_units(torch.arange(6.0), 3).tolist() == [3.0, 12.0]
    assert sum_over_units(torch.arange(3.0), 1).tolist() == [0.0, 1.0, 2.0]
