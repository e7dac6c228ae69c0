"""Progress: bars in a terminal, a line now and then where the output goes into a file."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import rich
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from rich.progress import TaskID

from pp_lightning.app.module import PrunedLM
from pp_lightning.progress import SECONDS, write_line


def progress_display() -> ProgressBar:
    """Bars for a terminal or a notebook; elsewhere, as under nohup or a scheduler, lines."""
    console = rich.get_console()
    return ProgressBars() if console.is_terminal or console.is_jupyter else ProgressLines()


class ProgressBars(RichProgressBar):
    """Lightning's Rich progress bar, labelled with the method and ratio under evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self._steps: dict[str, TaskID] = {}

    @property
    def test_description(self) -> str:
        """Label of the bar while testing."""
        return _evaluated(self.trainer)

    def show(self, name: str, done: int, total: int) -> None:
        """Show ``done`` of ``total`` steps of something called ``name``, in a bar of its own below."""
        if self.progress is None:
            return
        if done == 0 or name not in self._steps:
            self._steps[name] = self.progress.add_task(f"  {name}", total=total)
        self.progress.update(self._steps[name], completed=done)
        self.progress.refresh()


class ProgressLines(ProgressBar):
    """Lines on standard error: the first step of every piece of work, the last one, and one now and then between.

    Args:
        seconds: the least time between two lines of one piece of work.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        super().__init__()
        self.seconds = seconds
        self._enabled = True
        self._started: dict[str, tuple[float, int]] = {}
        self._paced: dict[str, tuple[float, int]] = {}
        self._written = 0.0
        self._shown = -1

    def disable(self) -> None:
        """Write nothing."""
        self._enabled = False

    def enable(self) -> None:
        """Write again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._begin("training", trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """One step further, with the loss."""

        def figures() -> str:  # read from the device: only for a line that is written
            metrics = self.get_metrics(trainer, pl_module)
            return "".join(f", {name} {value:.3f}" for name, value in metrics.items() if isinstance(value, float))

        total = trainer.estimated_stepping_batches
        self._step("training", trainer.global_step, None if total == float("inf") else int(total), figures)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Start the clock."""
        if batch_idx == 0:
            self._begin("held out", 0)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """One held-out batch further."""
        totals = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._batch("held out", batch_idx, totals)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Start the clock: calibration, which comes before the first batch, has a bar of its own."""
        if batch_idx == 0:
            self._begin(_evaluated(trainer), 0)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """One batch further."""
        self._batch(_evaluated(trainer), batch_idx, trainer.num_test_batches)

    def show(self, name: str, done: int, total: int) -> None:
        """Show ``done`` of ``total`` steps of something called ``name``."""
        if done == 0 or name not in self._started:
            self._begin(name, done)
        else:
            self._step(name, done, total)

    def _batch(self, name: str, index: int, totals: Sequence[int | float]) -> None:
        """One batch further in the one dataloader that there is."""
        [total] = totals
        self._step(name, index + 1, None if total == float("inf") else int(total))

    def _begin(self, name: str, done: int) -> None:
        self._started[name] = self._paced[name] = (time.monotonic(), done)
        self._shown = done

    def _step(self, name: str, done: int, total: int | None, figures: Callable[[], str] = str) -> None:
        since, before = self._started[name]
        now = time.monotonic()
        early = done not in (before + 1, total) and now - self._written < self.seconds
        if not self._enabled or early or done == self._shown:  # one step may be several batches
            return
        self._written, self._shown = now, done
        of = "" if total is None else f" of {total}"
        left = (total or done) - done
        paced_since, paced_before = self._paced[name]
        pace = (now - paced_since) / max(done - paced_before, 1)
        rest = f", {_duration(pace * left)} left" if left and done > before else ""
        if done == before + 1:
            self._paced[name] = (now, done)  # the first step, which may compile, says little about the others
        write_line(f"{name}: {done}{of}{figures()}, {_duration(now - since)}{rest}")


def _evaluated(trainer: Trainer) -> str:
    module = trainer.lightning_module
    if not isinstance(module, PrunedLM):
        return "testing"
    return f"{module.label} {module.settings.pruning_ratio:.0%}" if module.method else module.label


def _duration(seconds: float) -> str:
    """``7 s``, ``3 min`` or ``2 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
