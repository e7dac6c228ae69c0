"""What has entered MLPs since their channels were chosen: the next choice is made from it, while decoding."""

import torch
from torch import Tensor


class RecentInputs:
    """The inputs of a conversation's MLPs, token by token.

    Channels alone are chosen again: heads that were dropped have no keys for the tokens since.
    """

    def __init__(self, start: int) -> None:
        self.start = start
        self.tokens = 0
        self._inputs: dict[int, list[Tensor]] = {}

    def begin(self, length: int) -> None:
        """Before a batch: forget tokens that were taken from the cache since, and those of a batch that failed."""
        self.tokens = max(0, min(self.tokens, length - self.start))
        self.start = min(self.start, length)
        for number, parts in self._inputs.items():
            if sum(part.shape[1] for part in parts) > self.tokens:
                self._inputs[number] = [torch.cat(parts, 1)[:, : self.tokens]]

    def add(self, number: int, hidden: Tensor) -> None:
        """Note what enters one block, (B, S, D)."""
        parts = self._inputs.setdefault(number, [])
        if parts and parts[0].shape[0] != hidden.shape[0]:  # rows were taken away, or repeated
            parts.clear()
        parts.append(hidden.detach())

    def of(self, number: int) -> Tensor | None:
        """What entered one block, (B, n, D)."""
        parts = self._inputs.get(number)
        return torch.cat(parts, 1) if parts else None

    def copy(self) -> "RecentInputs":
        """For a conversation that branches off."""
        copied = RecentInputs(self.start)
        copied.tokens = self.tokens
        copied._inputs = {number: list(parts) for number, parts in self._inputs.items()}
        return copied

    def positions(self, tokens: int, history: Tensor) -> Tensor:
        """The rows of a history (P_max, C) at these tokens: its last row for positions beyond."""
        index = torch.arange(self.start, self.start + tokens, device=history.device)
        return history[index.clamp(max=history.shape[0] - 1)]
