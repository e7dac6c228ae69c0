"""Clocks: the wall's on a CPU, the device's own events on an accelerator."""

import itertools
import time

import torch


class Stopwatch:
    """Takes marks along a run, and gives their distances. For a CPU, where calls return when they are done."""

    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        """Note this moment, without waiting for the device."""
        self._marks.append(time.perf_counter())

    def laps(self) -> list[float]:
        """Seconds between successive marks. Waits for the device, and clears the marks."""
        marks, self._marks = self._marks, []
        return [after - before for before, after in itertools.pairwise(marks)]


class DeviceStopwatch(Stopwatch):
    """For an accelerator: events in its stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[torch.Event] = []

    def mark(self) -> None:
        """Record an event."""
        event = torch.Event(self._device, enable_timing=True)
        event.record(torch.accelerator.current_stream(self._device))
        self._events.append(event)

    def laps(self) -> list[float]:
        """Seconds between successive events."""
        torch.accelerator.synchronize(self._device)
        events, self._events = self._events, []
        return [before.elapsed_time(after) / 1000 for before, after in itertools.pairwise(events)]


def stopwatch_for(device: torch.device) -> Stopwatch:
    """The right clock for a device."""
    return Stopwatch() if device.type == "cpu" else DeviceStopwatch(device)
