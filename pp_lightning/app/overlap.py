"""How far the units that a method keeps agree with those that the whole batch would keep."""

from collections.abc import Callable, Hashable, Sequence

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from pp_lightning.app.prunable import PrunableModule
from pp_lightning.blocks import Block
from pp_lightning.pruning import is_pruned, kept_units

Kept = dict[str, list[Tensor]]  # "layer.block" to the kept units of every batch


class Overlap(Callback):
    """Notes the kept units of every batch of a test run, and compares them with those of Full-Batch Probing."""

    def __init__(self) -> None:
        self._kept: Kept = {}
        self._of_full_batch: dict[Hashable, Kept] = {}

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the last run."""
        self._kept = {}

    def on_test_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """Note what this batch ran on."""
        assert isinstance(pl_module, PrunableModule)
        if not is_pruned(pl_module.model):
            return
        for layer, units in kept_units(pl_module.model).items():
            for block, numbers in ((Block.ATTENTION, units.attention), (Block.MLP, units.mlp)):
                self._kept.setdefault(f"{layer}.{block.value}", []).append(numbers.cpu())

    def shares(self, key: Hashable, run_full_batch: Callable[[], object]) -> dict[str, float]:
        """Mean Jaccard index of the last run's units with those of Full-Batch Probing, by layer and block.

        ``key`` is of the batches and of the ratio: Full-Batch Probing runs once for each.
        """
        own = self._kept
        if key not in self._of_full_batch:
            run_full_batch()
            self._of_full_batch[key] = self._kept
        full = self._of_full_batch[key]
        return {name: _mean_jaccard(own[name], full[name]) for name in full if name in own}


def _mean_jaccard(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    pairs = [(set(a.tolist()), set(b.tolist())) for a, b in zip(first, second, strict=True)]
    return sum(len(a & b) / len(a | b) for a, b in pairs) / len(pairs)
