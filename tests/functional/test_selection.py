import torch

from pp_lightning.functional.selection import (
    keep_best,
    store_by_columns,
    take_columns,
    take_rows,
    unit_channels,
)


def test_keep_best_is_ascending():
    scores = torch.tensor([0.5, 3.0, -1.0, 2.0, 0.7])
    assert keep_best(scores, 3).tolist() == [1, 3, 4]
    assert keep_best(scores, 5).tolist() == [0, 1, 2, 3, 4]
    assert keep_best(scores, 3).dtype == torch.int64


def test_unit_channels():
    assert unit_channels(torch.tensor([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]
    assert unit_channels(torch.tensor([0, 2]), 1).tolist() == [0, 2]


def test_take_rows():
    weight = torch.arange(24.0).view(6, 4)
    taken = take_rows(weight, torch.tensor([0, 2]), 2)
    assert torch.equal(taken, weight[[0, 1, 4, 5]])
    assert taken.is_contiguous()
    assert torch.equal(take_rows(weight[:, 0].contiguous(), torch.tensor([1]), 2), weight[[2, 3], 0])  # a bias


def test_take_columns():
    weight = torch.arange(24.0).view(4, 6)
    assert torch.equal(take_columns(weight, torch.tensor([0, 2]), 2), weight[:, [0, 1, 4, 5]])
    assert torch.equal(take_columns(weight, torch.tensor([1, 5]), 1), weight[:, [1, 5]])


def test_columns_of_a_matrix_stored_by_columns():
    weight = torch.arange(24.0).view(4, 6)
    stored = store_by_columns(weight)
    assert torch.equal(stored, weight)
    assert stored.t().is_contiguous()
    for units, width in ((torch.tensor([0, 2]), 2), (torch.tensor([1, 5]), 1)):
        assert torch.equal(take_columns(stored, units, width), take_columns(weight, units, width))


def test_slices_are_written_where_they_are_told():
    weight = torch.arange(24.0).view(6, 4)
    units = torch.tensor([0, 2])
    memory = torch.empty(4, 4)
    assert take_rows(weight, units, 2, memory) is memory
    assert torch.equal(memory, weight[[0, 1, 4, 5]])
    columns = torch.empty(4, 6)
    taken = take_columns(store_by_columns(weight), torch.tensor([0, 1]), 2, columns)
    assert taken.data_ptr() == columns.data_ptr()
    assert torch.equal(taken, weight)
