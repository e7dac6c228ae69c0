"""How long work takes, said where it is long."""

import pytest

from pp_lightning.app.forecast import Forecast


def lines(seconds_a_batch, batches):
    told, now = [], [0.0]
    forecast = Forecast("calibrating", "--data.calibration_samples", 128, batches, told.append, lambda: now[0])
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
