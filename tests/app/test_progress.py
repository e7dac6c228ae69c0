"""Progress where there is no terminal."""

import io
from types import SimpleNamespace

import pytest
import rich
from rich.console import Console

from pp_lightning.app import progress
from pp_lightning.app.progress import ProgressBars, ProgressLines, progress_display


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.seconds)
    return now


def trainer(step=0, total=100, test_batches=3):
    """As much of a trainer as progress asks for."""
    return SimpleNamespace(
        global_step=step,
        estimated_stepping_batches=total,
        num_test_batches=[test_batches],
        num_val_batches=[test_batches],
        sanity_checking=False,
        lightning_module=None,
        loggers=[],
        progress_bar_metrics={"train_loss": 4.5 - step / 100},
        is_global_zero=True,
    )


def train(lines, clock, steps, seconds, total=100, batches=1, start=0):
    """Training of so many steps, each of which takes so long."""
    lines.on_train_start(trainer(start, total), None)
    for step in range(start + 1, start + steps + 1):
        for batch in range(batches):
            clock.seconds += seconds / batches
            done = step if batch == batches - 1 else step - 1
            lines.on_train_batch_end(trainer(done, total), None, None, None, batch)


def test_training_tells_the_first_step_and_then_now_and_then(clock, capsys):
    train(ProgressLines(seconds=30), clock, steps=13, seconds=5)
    assert capsys.readouterr().err.splitlines() == [
        "training: 1 of 100, train_loss 4.490, 5 s, 8 min left",
        "training: 7 of 100, train_loss 4.430, 35 s, 8 min left",
        "training: 13 of 100, train_loss 4.370, 65 s, 7 min left",
    ]


def test_the_last_step_is_told(clock, capsys):
    train(ProgressLines(seconds=1000), clock, steps=3, seconds=3000, total=3)
    assert capsys.readouterr().err.splitlines() == [
        "training: 1 of 3, train_loss 4.490, 50 min, 1 h 40 min left",
        "training: 2 of 3, train_loss 4.480, 1 h 40 min, 50 min left",
        "training: 3 of 3, train_loss 4.470, 2 h 30 min",
    ]


def test_a_step_of_several_batches_is_told_once(clock, capsys):
    train(ProgressLines(), clock, steps=2, seconds=8, batches=4, total=2)
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        "training: 1 of 2",
        "training: 2 of 2",
    ]


def test_time_left_of_a_resumed_training_counts_its_own_steps(clock, capsys):
    train(ProgressLines(), clock, steps=1, seconds=10, start=90)
    assert capsys.readouterr().err == "training: 91 of 100, train_loss 3.590, 10 s, 2 min left\n"


def test_an_open_end_is_not_guessed(clock, capsys):
    train(ProgressLines(), clock, steps=1, seconds=10, total=float("inf"))
    assert capsys.readouterr().err == "training: 1, train_loss 4.490, 10 s\n"


def test_a_slow_first_step_does_not_spoil_the_estimate(clock, capsys):
    """It may compile."""
    lines = ProgressLines(seconds=0)
    lines.on_train_start(trainer(), None)
    for step, seconds in enumerate((60, 2, 2), start=1):
        clock.seconds += seconds
        lines.on_train_batch_end(trainer(step, 10), None, None, None, step)
    assert [line.split(", ", 2)[2] for line in capsys.readouterr().err.splitlines()] == [
        "60 s, 9 min left",
        "62 s, 16 s left",
        "64 s, 14 s left",
    ]


def test_evaluation_counts_from_its_first_batch(clock, capsys):
    lines, own = ProgressLines(), trainer()
    clock.seconds = 500  # calibration
    for batch in range(3):
        lines.on_test_batch_start(own, None, None, batch)
        clock.seconds += 4
        lines.on_test_batch_end(own, None, None, None, batch)
    assert capsys.readouterr().err.splitlines() == ["testing: 1 of 3, 4 s, 8 s left", "testing: 3 of 3, 12 s"]


def test_training_goes_on_after_held_out_batches(clock, capsys):
    lines, own = ProgressLines(), trainer(step=5)
    lines.on_train_start(own, None)
    for batch in range(3):
        lines.on_validation_batch_start(own, None, None, batch)
        clock.seconds += 4
        lines.on_validation_batch_end(own, None, None, None, batch)
    own.global_step = 6
    clock.seconds += 3
    lines.on_train_batch_end(own, None, None, None, 6)
    assert capsys.readouterr().err.splitlines() == [
        "held out: 1 of 3, 4 s, 8 s left",
        "held out: 3 of 3, 12 s",
        "training: 6 of 100, train_loss 4.450, 15 s, 24 min left",
    ]


def test_steps_of_a_long_batch(clock, capsys):
    lines = ProgressLines()
    assert callable(lines.show)
    for done in range(3):
        lines.show("piqa", done, 2)
        clock.seconds += 2
    assert capsys.readouterr().err.splitlines() == ["piqa: 1 of 2, 2 s, 2 s left", "piqa: 2 of 2, 4 s"]


def test_other_processes_write_nothing(clock, capsys):
    lines, other = ProgressLines(), trainer()
    other.is_global_zero = False
    lines.setup(other, None, "test")
    lines.on_test_batch_start(other, None, None, 0)
    lines.on_test_batch_end(other, None, None, None, 0)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("terminal", "kind"), [(True, ProgressBars), (False, ProgressLines)])
def test_bars_are_for_terminals(terminal, kind, monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=terminal)
    monkeypatch.setattr(rich, "get_console", lambda: console)
    assert type(progress_display()) is kind
