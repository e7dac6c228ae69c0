"""Batches of long work: how long all of them take, said once, and their end at SIGTERM.

Lightning notes the signal, and looks at its note between the batches of its own loops only.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from transformers import PreTrainedModel

from pp_lightning.progress import Tell

_SAID_FROM = 60.0  # seconds
_BATCHES_FIRST = 2  # the first one warms up
_SLOWER = 1.5  # times: from there on another dtype is worth a word


class Forecast:
    """Watches batches of one piece of work, and says once how long all of them take, and what would take less.

    ``option``, whose present value is ``size``, would make it shorter, and so would another dtype of ``model``, maybe.
    """

    def __init__(
        self,
        work: str,
        option: str,
        size: int,
        batches: int,
        tell: Tell,
        model: PreTrainedModel,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.work, self.option, self.size, self.batches, self.model = work, option, size, batches, model
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
        shorter = f"{self.option} {less} takes {_minutes(seconds / 4)}"
        times = slower_than_float32(self.model.dtype) if self.model.device.type == "cpu" else 1.0
        if times > _SLOWER:
            dtype = str(self.model.dtype).removeprefix("torch.")
            shorter += f", and --model.dtype float32 is {times:.0f} times as fast on this processor as {dtype}"
        return f"{self.work} takes about {_minutes(seconds)}: {shorter}"


def slower_than_float32(dtype: torch.dtype) -> float:
    """How many times as long a product of matrices takes here, in tens of milliseconds."""
    if dtype == torch.float32:
        return 1.0
    matrix = torch.randn(512, 512)
    return _seconds(matrix.to(dtype)) / _seconds(matrix)


def _seconds(matrix: Tensor) -> float:
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        matrix @ matrix
        taken.append(time.perf_counter() - start)
    return min(taken)


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
