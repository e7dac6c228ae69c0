"""Batches of long work: how long all of them take, said once, and their end at SIGTERM.

Lightning notes the signal, and looks at its note between the batches of its own loops only.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException

from pp_lightning.progress import Tell

_SAID_FROM = 60.0  # seconds
_BATCHES_FIRST = 2  # the first one warms up


class Forecast:
    """Watches batches of one piece of work, and says once how long all of them take, and what would take less.

    ``option``, whose present value is ``size``, would make it shorter.
    """

    def __init__(
        self, work: str, option: str, size: int, batches: int, tell: Tell, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.work, self.option, self.size, self.batches = work, option, size, batches
        self._tell, self._clock, self._start, self._done = tell, clock, clock(), 0

    def batch_done(self) -> None:
        """One more batch is done."""
        self._done += 1
        if self._done != min(_BATCHES_FIRST, self.batches):
            return
        seconds = (self._clock() - self._start) * self.batches / self._done
        if seconds > _SAID_FROM:
            self._tell(self._line(seconds))

    def _line(self, seconds: float) -> str:
        less = max(1, self.size // 4)
        return f"{self.work} takes about {_minutes(seconds)}: {self.option} {less} takes {_minutes(seconds / 4)}"


def _minutes(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes} minute{'s' if minutes > 1 else ''}"


class UntilTerminated:
    """Batches that a loop of ours goes through inside a run of the trainer's, until that is told to end."""

    def __init__(
        self, batches: Sequence[Mapping[str, Any]], trainer: L.Trainer, forecast: Forecast | None = None
    ) -> None:
        self.batches = batches
        self.trainer = trainer
        self.forecast = forecast

    def __len__(self) -> int:
        """How many there are."""
        return len(self.batches)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        """One after the other."""
        for batch in self.batches:
            if self.trainer.received_sigterm:
                raise SIGTERMException
            yield batch
            if self.forecast is not None:
                self.forecast.batch_done()
