"""Statistics, scores, histories and losses are float32 whatever torch makes by default."""

import pytest
import torch

from pp_lightning import calibrate, kept_units, prune_, taylor_importances
from pp_lightning.functional.draws import draw_samples
from pp_lightning.functional.lora import lora_importance
from pp_lightning.functional.moments import TokenPositions, placed_count, placed_sum, sum_of_squares
from pp_lightning.functional.scores import wanda_column_scores
from pp_lightning.functional.taylor import Taylor
from pp_lightning.methods import FLAP, FullBatchProbing, ProbePruning, StaticPPsp, WandaSP
from tests.models import SETTINGS, calibration_batches, choices, ids, logits, pruned_blocks, ragged, statistics, tiny

OTHERS = [torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(params=OTHERS, ids=str)
def other(request):
    """Another default, which ``conftest.py`` takes back; anything made before it is float32."""
    return request.param


def test_counts_beyond_what_half_precision_counts_to(other):
    model, batch = tiny("llama"), ragged([3, 2], "left")
    whole = {"input_ids": ids(1, 3).expand(2000, -1)}
    torch.set_default_dtype(other)
    found = calibrate(model, [whole, batch], progress=False).counts
    assert found.dtype == torch.float32
    assert found.tolist() == [2002.0, 2002.0, 2001.0]
    real = torch.ones(2000, 2, dtype=torch.bool)
    count = placed_count(TokenPositions(real.long().cumsum(1) - 1, real, 2))
    assert count.dtype == torch.float32 and count.tolist() == [2000.0, 2000.0]


def test_statistics_are_the_same(other):
    batches = [*calibration_batches(2), ragged([9, 4], "left")]
    expected = calibrate(tiny("llama"), batches, progress=False)
    model = tiny("llama")
    torch.set_default_dtype(other)
    found = calibrate(model, batches, progress=False)
    assert torch.equal(found.counts, expected.counts) and found.counts.dtype == torch.float32
    for key, sums in expected.sums.items():
        for name in ("squares", "values"):
            torch.testing.assert_close(getattr(found.sums[key], name), getattr(sums, name), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.residuals[key], expected.residuals[key], rtol=1e-4, atol=1e-4)


def test_sums_and_scores_are_float32(other):
    states, weight = torch.randn(3, 4, 8), torch.randn(5, 8)
    down, up = torch.randn(2, 8), torch.randn(5, 2)
    real = torch.ones(3, 4, dtype=torch.bool)
    places = TokenPositions(real.long().cumsum(1) - 1, real, 4)

    def results():
        return [
            sum_of_squares(states),
            placed_sum(states, places),
            wanda_column_scores(weight, torch.ones(8, dtype=torch.float32)),
            lora_importance(weight, down, up, down, up, 2.0, of_outputs=False),
            draw_samples((20,), 0, 1),
        ]

    expected = results()
    torch.set_default_dtype(other)
    for one, two in zip(results(), expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    "method", [ProbePruning, ProbePruning.best, FullBatchProbing, StaticPPsp, WandaSP, FLAP], ids=lambda m: m.__name__
)
def test_choices_are_the_same(other, method):
    stats, kept = statistics("llama_gqa"), []
    models = [tiny("llama_gqa") for _ in range(2)]
    for model, default in zip(models, (torch.float32, other), strict=True):
        torch.set_default_dtype(default)
        prune_(model, method(), stats, **SETTINGS)
        logits(model, ids())
        kept.append(choices(kept_units(model)))
    assert kept[0] == kept[1]
    for block in pruned_blocks(models[1]).values():
        assert all(buffer.dtype == torch.float32 for buffer in block.buffers() if buffer.is_floating_point())


@pytest.mark.parametrize("taylor", ["param_first", "param_mix"])
def test_importances_are_float32(other, taylor):
    batches = [{"input_ids": ids(2, 12)}]
    expected = taylor_importances(tiny("llama"), batches, Taylor(taylor), progress=False)
    model = tiny("llama")
    torch.set_default_dtype(other)
    found = taylor_importances(model, batches, Taylor(taylor), progress=False)
    for key, members in expected.members.items():
        for role, vector in members.items():
            assert found.members[key][role].dtype == torch.float32
            torch.testing.assert_close(found.members[key][role], vector, rtol=1e-3, atol=1e-6)
