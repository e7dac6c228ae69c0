"""Ending at SIGTERM: Lightning notes it, and looks at its note between the batches of its own loops only."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException

from pp_lightning.app.forecast import Forecast


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
        """One after the other.

        Raises:
            SIGTERMException: in place of the next one.
        """
        for batch in self.batches:
            if self.trainer.received_sigterm:
                raise SIGTERMException
            yield batch
            if self.forecast is not None:
                self.forecast.batch_done()
