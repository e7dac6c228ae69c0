import pytest
import torch

from pp_lightning.data.order import ShuffledBatches

ROWS = [(torch.full((4,), n), torch.full((4,), n)) for n in range(50)]


def seen(loader, epochs=1):
    """First token of every row, batch by batch."""
    return [batch["input_ids"][:, 0].tolist() for _ in range(epochs) for batch in loader]


def rows_of(batches):
    return [row for batch in batches for row in batch]


def test_every_row_once_an_epoch_in_another_order():
    first, second = (seen(loader) for loader in [ShuffledBatches(ROWS, 5, 0)] * 2)
    assert sorted(rows_of(first)) == sorted(rows_of(second)) == list(range(50))
    assert first != second
    assert seen(ShuffledBatches(ROWS, 5, 0, seed=1)) != first
    assert seen(ShuffledBatches(ROWS, 5, 0)) == first


@pytest.mark.parametrize("stop", [0, 1, 4, 9, 10, 13, 19])
def test_continues_where_it_stopped(stop):
    whole = seen(ShuffledBatches(ROWS, 5, 0), epochs=2)
    loader, begun = ShuffledBatches(ROWS, 5, 0), []
    while len(begun) < stop:
        for batch in loader:
            begun.append(batch["input_ids"][:, 0].tolist())
            if len(begun) == stop:
                break
    fresh = ShuffledBatches(ROWS, 5, 0)
    fresh.load_state_dict(loader.state_dict())
    rest = []
    while len(begun) + len(rest) < 20:
        rest += seen(fresh)
    assert begun + rest == whole


def test_processes_share_what_one_sees_in_several_batches():
    one = seen(ShuffledBatches(ROWS, 3, 0, accumulate=4))
    two = [seen(ShuffledBatches(ROWS, 3, 0, rank=rank, world=2, accumulate=2)) for rank in (0, 1)]
    assert len(one) == 16 and [len(share) for share in two] == [8, 8]  # 50 rows are 4 steps of 12
    for step in range(4):
        together = rows_of(share[2 * step + i] for i in (0, 1) for share in two)
        assert together == rows_of(one[4 * step : 4 * step + 4])
    larger = seen(ShuffledBatches(ROWS, 12, 0))
    assert [rows_of(one[4 * s : 4 * s + 4]) for s in range(4)] == larger


def test_rows_of_different_lengths_are_padded():
    rows = [(torch.tensor([5, 6, 7]), torch.tensor([-100, 6, 7])), (torch.tensor([8]), torch.tensor([8]))]
    batch = next(iter(ShuffledBatches(rows, 2, pad_id=9)))
    order = batch["attention_mask"].sum(1).argsort(descending=True)
    assert batch["input_ids"][order].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"][order].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"][order].tolist() == [[-100, 6, 7], [8, -100, -100]]
