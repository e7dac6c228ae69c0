"""Keeping and restoring what a dynamically pruned model remembers."""

import hashlib

from torch import Tensor
from transformers import PreTrainedModel

from pp_lightning.pruned.block import PrunedBlock
from pp_lightning.pruning import is_pruned, pruning_of


class Histories:
    """A copy of a model's histories on the CPU. Empty for dense and statically pruned models, which have none.

    A history is state: every batch moves it. Restoring the one from before a task makes the task's result independent
    of the tasks in front of it.

    Args:
        model: the model; :meth:`restore` puts the copy back into it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        blocks = pruning_of(model).pruners.values() if is_pruned(model) else ()
        self._copies: list[tuple[PrunedBlock, Tensor]] = [
            (block, block.history.detach().to("cpu", copy=True)) for block in blocks if block.history is not None
        ]

    def restore(self) -> None:
        """Make the model remember what it did when the copy was taken."""
        for block, copy in self._copies:
            assert block.history is not None
            block.history.copy_(copy)

    def digest(self) -> str:
        """SHA-256 (hex) of the copy; models calibrated on different text differ in it."""
        total = hashlib.sha256()
        for _, history in self._copies:
            total.update(history.numpy().tobytes())
        return total.hexdigest()
