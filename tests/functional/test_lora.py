import pytest
import torch

from pp_lightning.functional.lora import lora_gradient, lora_importance

OUT, IN, RANK, SCALE = 300, 5, 3, 2.0  # more rows than are taken at once


@pytest.fixture
def parts():
    """W, A, B, gA, gB."""
    return (
        torch.randn(OUT, IN),
        torch.randn(RANK, IN),
        torch.randn(OUT, RANK),
        torch.randn(RANK, IN),
        torch.randn(OUT, RANK),
    )


def test_gradient_is_the_change_of_the_product(parts):
    """One unit step down both gradients changes B A by minus the estimate."""
    _, a, b, ga, gb = parts
    torch.testing.assert_close(lora_gradient(a, b, ga, gb), b @ a - (b - gb) @ (a - ga), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lora_gradient(a, b, ga, gb), gb @ a + b @ ga - gb @ ga, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(lora_gradient(a, b, ga, gb), gb @ a + b @ ga)  # the quadratic term is there


@pytest.mark.parametrize("of_outputs", [True, False])
def test_importance_equals_the_naive_loop(parts, of_outputs):
    w, a, b, ga, gb = parts
    expected = [0.0] * (OUT if of_outputs else IN)
    for i in range(OUT):
        for j in range(IN):
            guess = sum(gb[i, k] * a[k, j] + b[i, k] * ga[k, j] - gb[i, k] * ga[k, j] for k in range(RANK))
            whole = w[i, j] + SCALE * sum(b[i, k] * a[k, j] for k in range(RANK))
            expected[i if of_outputs else j] += abs(float(guess * whole))
    found = lora_importance(w, a, b, ga, gb, SCALE, of_outputs=of_outputs)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-4)
    without = lora_importance(w, a, b, ga, gb, 0.0, of_outputs=of_outputs)
    assert not torch.allclose(found, without, rtol=1e-2)


def test_fresh_adapters_project_the_true_gradient():
    """At B = 0, gB is c G A^T and gA zero: with orthonormal A of full rank the estimate is the gradient, times c."""
    true, weight = torch.randn(7, IN), torch.randn(7, IN)
    a = torch.linalg.qr(torch.randn(IN, IN)).Q
    fresh = {"up": torch.zeros(7, IN), "down_gradient": torch.zeros(IN, IN), "up_gradient": SCALE * true @ a.T}
    torch.testing.assert_close(lora_gradient(a, **fresh), SCALE * true, rtol=1e-4, atol=1e-5)
    found = lora_importance(weight, a, **fresh, scale=SCALE, of_outputs=True)
    torch.testing.assert_close(found, SCALE * (weight * true).abs().sum(1), rtol=1e-4, atol=1e-5)
