"""How long work will take, said once its pace is known, where that is more than a minute."""

import time
from collections.abc import Callable

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
