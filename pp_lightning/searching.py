"""Counts that are searched: units move between blocks while the loss on held-out calibration batches falls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pp_lightning.blocks import BlockKey
from pp_lightning.families import BlockModules
from pp_lightning.functional.least_squares import solve_kept
from pp_lightning.functional.selection import unit_channels
from pp_lightning.interfaces import model_inputs
from pp_lightning.progress import Tell
from pp_lightning.sensitivity import mean_loss

_Pair = tuple[BlockKey, BlockKey]  # takes a step, gives a step
_SMALLEST_GAIN = 1e-5  # nats a token: less is rounding


@dataclass(frozen=True)
class Movable:
    """One block, as the search sees it.

    Attributes:
        ranked: its units (U,) int64, the one that stays longest first.
        moments: E[x x^T] at its output matrix, (C, C) float32, on the dense model.
        step: units that move at a time.
    """

    modules: BlockModules
    ranked: Tensor
    moments: Tensor
    unit_flops: int
    step: int
    floor: int

    def matrix(self, dense: Tensor, count: int, ridge: float) -> Tensor:
        """The output matrix (D, C) that acts as if ``count`` units stayed and took over what went."""
        if count == len(self.ranked):
            return dense
        width = dense.shape[1] // len(self.ranked)
        kept = unit_channels(self.ranked[:count].sort().values, width)
        (columns,) = solve_kept(dense, self.moments.double(), kept, [ridge])
        return torch.zeros_like(dense).index_copy(1, kept, columns.to(dense.dtype))


@dataclass
class Search:
    """A search under way.

    Attributes:
        model: dense; output matrices are changed while the search lasts.
        blocks: in the model's order.
        ridge: of the updates.
        passes: evaluations of the batches that are left.
        path: what was accepted, for result files.
    """

    model: PreTrainedModel
    blocks: Mapping[BlockKey, Movable]
    batches: Sequence[Mapping[str, Any]]
    ridge: float
    passes: int
    tell: Tell
    path: list[dict[str, Any]] = field(default_factory=list)

    @torch.no_grad()
    def run(self, keep: Mapping[BlockKey, int]) -> dict[BlockKey, int]:
        """Counts at no more FLOPs than those of ``keep``, with a loss that is not higher.

        Every round tries a step up and a step down in each block, pairs what gains most with what costs least, and
        takes as many of the pairs as lower the loss together. It ends when none does, or when the passes are spent.
        """
        dense = {key: block.modules.output_weight.detach().clone() for key, block in self.blocks.items()}
        counts = dict(keep)
        try:
            self._set(dense, counts, self.blocks)
            loss = self._loss()
            self._note(loss, 0)
            while self.passes > 0:
                pairs = self._pairs(dense, counts, loss)
                counts, new = self._taken(dense, counts, pairs, loss)
                if new >= loss - _SMALLEST_GAIN:
                    break
                loss = new
        finally:
            for key, block in self.blocks.items():
                block.modules.output_weight.copy_(dense[key])
        return counts

    def _pairs(self, dense: Mapping[BlockKey, Tensor], counts: Mapping[BlockKey, int], loss: float) -> list[_Pair]:
        """Blocks that gain and blocks that give, the best pair first; each block in one pair."""
        gains: dict[BlockKey, float] = {}
        costs: dict[BlockKey, float] = {}
        for key, block in self.blocks.items():
            now = block.modules.output_weight.clone()
            for sign, found in ((1, gains), (-1, costs)):
                count = counts[key] + sign * block.step
                if self.passes > 0 and block.floor <= count <= len(block.ranked):
                    self._set(dense, {key: count}, [key])
                    found[key] = sign * (loss - self._loss())
            block.modules.output_weight.copy_(now)
        takers = sorted(gains, key=gains.__getitem__, reverse=True)
        givers = sorted(costs, key=costs.__getitem__)
        pairs: list[_Pair] = []
        for taker in takers:
            used = {key for pair in pairs for key in pair}
            giver = next((key for key in givers if key not in used | {taker}), None)
            if giver is None or taker in used or gains[taker] <= costs[giver] + _SMALLEST_GAIN:
                continue
            pairs.append((taker, giver))
        return pairs

    def _taken(
        self, dense: Mapping[BlockKey, Tensor], counts: dict[BlockKey, int], pairs: list[_Pair], loss: float
    ) -> tuple[dict[BlockKey, int], float]:
        """Counts with as many of the pairs, from the first, as lower the loss, and that loss."""
        while pairs and self.passes > 0:
            moved = self._moved(counts, pairs)
            changed = [key for key in counts if moved[key] != counts[key]]
            self._set(dense, moved, changed)
            new = self._loss()
            if changed and new < loss - _SMALLEST_GAIN:
                self._note(new, len(changed))
                return moved, new
            self._set(dense, counts, changed)
            pairs = pairs[: len(pairs) // 2]
        return counts, loss

    def _moved(self, counts: Mapping[BlockKey, int], pairs: Sequence[_Pair]) -> dict[BlockKey, int]:
        """Counts after these moves; a move that would take more FLOPs than were freed so far is left out."""
        moved, spare = dict(counts), 0
        for taker, giver in pairs:
            up, down = self.blocks[taker], self.blocks[giver]
            left = spare + down.step * down.unit_flops - up.step * up.unit_flops
            if left >= 0:
                moved[taker] += up.step
                moved[giver] -= down.step
                spare = left
        return moved

    def _set(self, dense: Mapping[BlockKey, Tensor], counts: Mapping[BlockKey, int], keys: Any) -> None:
        for key in keys:
            block = self.blocks[key]
            block.modules.output_weight.copy_(block.matrix(dense[key], counts[key], self.ridge))

    def _loss(self) -> float:
        """Mean next-token loss over the batches, in nats."""
        self.passes -= 1
        return mean_loss(self.batches, self._batch_loss)

    def _batch_loss(self, number: int, labels: Tensor) -> Tensor:
        inputs = model_inputs(self.model, self.batches[number])
        loss: Tensor = self.model(**inputs, labels=labels.to(self.model.device)).loss
        return loss

    def _note(self, loss: float, moved: int) -> None:
        self.path.append({"loss": loss, "blocks_moved": moved, "passes_left": self.passes})
        self.tell(f"searching counts: held-out loss {loss:.4f}, {self.passes} passes left")
