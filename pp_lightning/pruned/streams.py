"""A stream of its own for parallel probes: on an accelerator they run beside the block in front of theirs."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from pp_lightning.pruned.choice import Choice


class Ahead(NamedTuple):
    """A choice that is being made."""

    choice: Choice
    done: torch.Event


class SideStream:
    """Makes choices beside the work of the current stream, without a word to the host.

    What a choice reads must stay as it is until the choice is joined: whoever starts one joins it before the current
    stream goes on to what depends on it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.Stream(device)

    def moment(self) -> torch.Event:
        """Now, in the current stream: when what has been asked of it so far is done."""
        return torch.accelerator.current_stream(self.device).record_event()

    def start(self, after: torch.Event, choose: Callable[[], Choice]) -> Ahead:
        """Make a choice as soon as a moment of the current stream has passed."""
        self._stream.wait_event(after)
        with self._stream:
            choice = choose()
        return Ahead(choice, self._stream.record_event())

    def join(self, ahead: Ahead) -> Choice:
        """The choice, for the current stream, which waits for it."""
        current = torch.accelerator.current_stream(self.device)
        current.wait_event(ahead.done)
        for tensor in ahead.choice:
            if tensor is not None:
                tensor.record_stream(current)  # its memory is the side's, which must not use it again too early
        return ahead.choice

    def __deepcopy__(self, memo: dict[int, object]) -> "SideStream":
        """Copies of a model have a stream of their own."""
        return SideStream(self.device)
