"""Linear maps by the fastest kernel: the same numbers."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pp_lightning.functional import linear as linear_module
from pp_lightning.functional.linear import THIN, linear, thin_linear, wants_rows


@pytest.mark.parametrize("tokens", [1, THIN, THIN + 1])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_stock_product(tokens, bias):
    states, weight = torch.randn(1, tokens, 48), torch.randn(32, 48)
    vector = torch.randn(32) if bias else None
    with torch.no_grad():
        torch.testing.assert_close(linear(states, weight, vector), F.linear(states, weight, vector))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN here")
def test_thin_products_count_as_products():
    states, weight = torch.randn(2, 3, 8), torch.randn(5, 8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        thin_linear(states, weight, None)
    assert counter.get_total_flops() == 2 * 2 * 3 * 8 * 5


def test_gradients_go_the_stock_way():
    states, weight = torch.randn(1, 4, 8), torch.randn(5, 8, requires_grad=True)
    linear(states, weight, None).sum().backward()
    assert weight.grad is not None


def test_emulated_types_are_multiplied_by_rows(monkeypatch):
    """In half precision without hardware for it, a product by columns takes ten times as long as one by rows."""
    states, weight = torch.randn(1, THIN + 1, 48), torch.randn(48, 32).t()
    stored, product = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, b: stored.append(w.is_contiguous()) or product(x, w, b))
    for native in (True, False):
        monkeypatch.setattr(linear_module, "is_emulated", lambda *_, native=native: not native)
        assert wants_rows(weight) != native
        torch.testing.assert_close(linear(states, weight, None), states @ weight.t())
    assert stored == [False, True]
