import pytest
import torch

from pp_lightning.functional.taylor import Taylor, taylor_importance

ELEMENT = {
    Taylor.VECTORIZE: lambda w, g, a: w * g,
    Taylor.PARAM_FIRST: lambda w, g, a: abs(w * g),
    Taylor.PARAM_SECOND: lambda w, g, a: abs(w * a * w),
    Taylor.PARAM_MIX: lambda w, g, a: abs(w * g - 0.5 * w * a * w),
}


def naive(weight, gradient, squares, taylor, of_outputs):
    """One element at a time."""
    rows, columns = weight.shape
    result = [0.0] * (rows if of_outputs else columns)
    for i in range(rows):
        for j in range(columns):
            element = ELEMENT[taylor](weight[i, j].item(), gradient[i, j].item(), squares[i, j].item())
            result[i if of_outputs else j] += element
    return torch.tensor([abs(value) for value in result])


@pytest.mark.parametrize("taylor", Taylor)
@pytest.mark.parametrize("of_outputs", [True, False])
@pytest.mark.parametrize("shape", [(6, 4), (300, 3)])  # fewer rows than are taken at once, and more
def test_equals_the_naive_loop(taylor, of_outputs, shape):
    weight, gradient, squares = torch.randn(shape), torch.randn(shape), torch.rand(shape)
    found = taylor_importance(weight, gradient, squares, taylor, of_outputs=of_outputs)
    torch.testing.assert_close(found, naive(weight, gradient, squares, taylor, of_outputs), rtol=1e-4, atol=1e-5)
    assert found.dtype == torch.float32
    for other in set(Taylor) - {taylor}:
        assert not torch.allclose(found, naive(weight, gradient, squares, other, of_outputs), rtol=1e-2)


def test_variants_say_what_they_use():
    weight, gradient = torch.randn(4, 4), torch.randn(4, 4)
    for taylor in Taylor:
        given = {"gradient": gradient if taylor.uses_gradient else None}
        given["squares"] = gradient.square() if taylor.uses_squares else None
        assert taylor_importance(weight, **given, taylor=taylor, of_outputs=True).shape == (4,)
    with pytest.raises(AssertionError, match="lacks"):
        taylor_importance(weight, None, None, Taylor.PARAM_FIRST, of_outputs=True)


def test_half_precision_weights_are_scored_in_float32():
    weight, gradient = torch.full((2, 2), 1e-3).half(), torch.full((2, 2), 1e-4).half()
    found = taylor_importance(weight, gradient, None, Taylor.PARAM_FIRST, of_outputs=True)
    torch.testing.assert_close(found, torch.full((2,), 2e-7), rtol=1e-2, atol=0)
    assert (weight * gradient).sum() != found[0]  # in half precision this product is mostly rounding
