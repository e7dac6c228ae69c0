"""The order in which training rows are seen: the same for any number of processes, and after an interruption."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pp_lightning.data.windows import Batch, collate_labelled

Row = tuple[Tensor, Tensor]  # ids and labels, (S,) each


@dataclass
class ShuffledBatches:
    """Batches of rows, shuffled anew each epoch; iterating goes on where :meth:`load_state_dict` says.

    The order depends on ``seed`` and epoch alone. Consecutive batches go to the processes in turn, so that several
    processes see in one step what one process sees in several batches. An epoch is whole optimiser steps: the rows left
    over are other ones each time.

    An optimiser step takes ``accumulate`` batches of each process.
    """

    rows: Sequence[Row]
    batch_size: int
    pad_id: int
    seed: int = 0
    rank: int = 0
    world: int = 1
    accumulate: int = 1
    epoch: int = 0
    position: int = 0

    def __len__(self) -> int:
        """Batches of this process in an epoch."""
        return len(self.rows) // (self.batch_size * self.world * self.accumulate) * self.accumulate

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        order = torch.randperm(len(self.rows), generator=generator).tolist()
        for index in range(self.position, len(self)):
            # Before the batch is handed out, as the last one's reader does not come back.
            self.epoch, self.position = (self.epoch, index + 1) if index + 1 < len(self) else (self.epoch + 1, 0)
            start = (index * self.world + self.rank) * self.batch_size
            yield collate_labelled([self.rows[i] for i in order[start : start + self.batch_size]], self.pad_id)

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch comes from."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there."""
        self.epoch, self.position = state["epoch"], state["position"]
