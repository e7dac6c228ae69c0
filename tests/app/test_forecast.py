"""How long work takes, said where it is long."""

import pytest
import torch

from pp_lightning.app import forecast as forecasting
from pp_lightning.app.forecast import Forecast
from tests.models import tiny


def lines(seconds_a_batch, batches, dtype=torch.float32):
    told, now = [], [0.0]
    model = tiny("llama").to(dtype)
    forecast = Forecast("calibrating", "--data.calibration_samples", 128, batches, told.append, model, lambda: now[0])
    for _ in range(batches):
        now[0] += seconds_a_batch
        forecast.batch_done()
    return told


@pytest.mark.parametrize(("seconds", "batches"), [(30.0, 24), (720.0, 1)])
def test_long_work_is_forecast_once_with_what_takes_less(seconds, batches):
    assert lines(seconds, batches) == [
        "calibrating takes about 12 minutes: --data.calibration_samples 32 takes 3 minutes"
    ]


def test_short_work_is_not():
    assert lines(1.0, 50) == []


@pytest.mark.parametrize(("times", "said"), [(8.0, True), (1.2, False)])
def test_a_dtype_that_is_slow_here_is_told(monkeypatch, times, said):
    monkeypatch.setattr(forecasting, "slower_than_float32", lambda dtype: times if dtype == torch.bfloat16 else 1.0)
    (line,) = lines(30.0, 24, torch.bfloat16)
    assert ("--model.dtype float32 is 8 times as fast on this processor as bfloat16" in line) == said and len(
        line
    ) < 200


def test_float32_is_not_measured_against_itself():
    assert forecasting.slower_than_float32(torch.float32) == 1.0
    assert forecasting.slower_than_float32(torch.bfloat16) > 0.0
