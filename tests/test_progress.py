"""Progress of the library's long loops where there is no terminal."""

import pytest
from transformers.utils import logging

from pp_lightning import calibrate, taylor_importances
from pp_lightning.progress import phases
from tests.models import calibration_batches, tiny


@pytest.fixture
def bars(monkeypatch):
    """Progress bars are off in tests; here they are on."""
    monkeypatch.setattr(logging, "_tqdm_active", True)


@pytest.mark.parametrize(("collect", "name"), [(calibrate, "calibrating"), (taylor_importances, "gradients")])
def test_a_log_file_gets_whole_lines(bars, collect, name, capsys):
    batches = list(calibration_batches())
    collect(tiny("llama"), batches)
    text = capsys.readouterr().err
    number = len(batches)
    assert text.startswith(f"{name}: 0 of {number}, 00:00, ? left\n{name}: {number} of {number}, ")
    assert text.count("\n") == 2 and "\r" not in text


def test_no_progress_no_lines(bars, capsys):
    calibrate(tiny("llama"), calibration_batches(), progress=False)
    assert capsys.readouterr().err == ""


def test_a_terminal_keeps_its_bar(bars, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    calibrate(tiny("llama"), calibration_batches())
    assert "\rcalibrating: 100%|" in capsys.readouterr().err


def test_phases_tell_what_they_took(monkeypatch):
    times, lines = iter([0.0, 12.4, 12.4, 40.0]), []
    monkeypatch.setattr("pp_lightning.progress.time.monotonic", lambda: next(times))
    with phases(lines.append) as begin:
        begin("tracing")
        begin("writing")
    assert lines == ["tracing", "tracing: 12 s", "writing", "writing: 28 s"]
