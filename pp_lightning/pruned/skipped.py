"""Batches that were not finite: counted without waiting for the device, and reported once."""

import warnings

import torch
from torch import Tensor


class SkippedBatches:
    """Counts the batches that moved no history, as they were not finite."""

    def __init__(self) -> None:
        self._number = 0
        self._on_device: Tensor | None = None  # where the model is, not looked at before somebody asks
        self._reported = False

    def add(self, finite: Tensor) -> None:
        """Note one batch; on a CPU it is reported at once."""
        if finite.device.type == "cpu":
            self._number += not finite
            self._report(self._number)
            return
        with torch.inference_mode(False):
            if self._on_device is None or self._on_device.device != finite.device:
                self._number, self._on_device = self.number, torch.zeros((), dtype=torch.int64, device=finite.device)
            self._on_device += ~finite

    @property
    def number(self) -> int:
        """How many so far. Waits for the device, and reports."""
        found = self._number + (0 if self._on_device is None else int(self._on_device))
        self._report(found)
        return found

    def _report(self, found: int) -> None:
        if found and not self._reported:
            self._reported = True
            warnings.warn(
                "a batch was not finite: it moved no history, and later batches choose as if it had not been",
                RuntimeWarning,
                stacklevel=2,
            )
