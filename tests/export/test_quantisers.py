"""Widths that fall back are told before the export."""

from pp_lightning.export.quantisers import shared_among, suits
from pp_lightning.export.sizes import Widths


def test_rows_that_do_not_suit_are_counted():
    layers = [Widths(8, 8, 704), Widths(5, 5, 448)]
    found = list(suits(layers, head_size=32, hidden_size=256).values())
    assert found == [0, 1, 3, 3]  # 160 of heads; 160, 704 and 448; the same


def test_devices_that_share_heads():
    assert shared_among([Widths(8, 4, 64), Widths(4, 4, 32)]) == [2, 4]
    assert shared_among([Widths(5, 5, 64)]) == []
    assert shared_among([Widths(8, 8, 64), Widths(0, 0, 64)]) == [2, 4, 8]
