"""FLAP: fluctuation metric, one standardised ranking over all layers, bias compensation (arXiv 2312.11983)."""

from collections.abc import Iterator, Sequence
from copy import copy
from typing import ClassVar, Self

import torch
from torch import Tensor

from pp_lightning.blocks import Block
from pp_lightning.functional.scores import flap_column_scores, standardised, sum_over_units
from pp_lightning.functional.selection import keep_best, unit_channels
from pp_lightning.methods.base import BOTH_BLOCKS, BlockName, BlockToPrune, StaticChoice, StaticMethod, UnitName
from pp_lightning.methods.ranking import ranked_counts
from pp_lightning.statistics import Statistics

_ROWS_AT_ONCE = 256


class FLAP(StaticMethod[Statistics]):
    """Static: removes what fluctuates least, with ratios per layer, and puts the removed channels' mean into a bias.

    Each block's metric (squared in attention) is standardised over its own columns; heads take the mean of theirs.
    All units of all pruned layers then form one ranking, from which the least important go until their cost reaches the
    budget. A unit costs its weights: a head over a channel is ``4 d / 3`` in LLaMA without grouped queries.

    Args:
        blocks: which blocks are pruned, ``attention``, ``mlp`` or both.
        attention_unit: ``query_head`` or ``kv_group``; None takes groups where query heads share key/value heads.
        bias: add ``W E[x]`` of the removed channels to the block's output.
        uniform: give every layer the same ratio instead of the global ranking's.
    """

    label: ClassVar[str] = "flap"
    needs_means: ClassVar[bool] = True

    def __init__(
        self,
        blocks: Sequence[BlockName] = BOTH_BLOCKS,
        attention_unit: UnitName | None = None,
        bias: bool = True,
        uniform: bool = False,
    ) -> None:
        super().__init__(blocks, attention_unit)
        self.bias = bias
        self.uniform = uniform

    @property
    def restores_means(self) -> bool:
        """The bias does."""
        return self.bias

    @property
    def allocates(self) -> bool:
        """Unless its ratios are uniform."""
        return not self.uniform

    def with_uniform_counts(self) -> Self:
        """The same without the ranking over layers."""
        if self.uniform:
            return self
        method = copy(self)
        method.uniform = True
        return method

    def choose(
        self, blocks: Sequence[BlockToPrune], calibration_data: Statistics
    ) -> Iterator[tuple[BlockToPrune, StaticChoice]]:
        """Scores and counts for all blocks first, then one choice at a time."""
        scores = [self.unit_scores(block, calibration_data) for block in blocks]
        keeps = [block.plan.keep for block in blocks] if self.uniform else ranked_counts(blocks, scores)
        for block, unit_scores, keep in zip(blocks, scores, keeps, strict=True):
            kept = keep_best(unit_scores, keep)
            yield block, StaticChoice(kept, self._bias(block, kept, calibration_data) if self.bias else None)

    def unit_scores(self, block: BlockToPrune, calibration_data: Statistics) -> Tensor:
        """Standardised scores (U,) float32, comparable between blocks."""
        weight = block.weight
        columns = flap_column_scores(weight, calibration_data.variance(*block.key).to(weight.device))
        if block.plan.block is Block.ATTENTION:
            columns = columns.square()
        width = block.units.channels
        return block.checked(sum_over_units(standardised(columns), width) / width)

    def _bias(self, block: BlockToPrune, kept: Tensor, statistics: Statistics) -> Tensor:
        weight = block.weight
        mean = statistics.channel_moments(*block.key)[0].to(weight.device)
        removed = mean.index_fill(0, unit_channels(kept, block.units.channels), 0.0)
        # Of copies, some rows at a time: how a product rounds depends, on some processors, on where a weight begins.
        parts = weight.detach().split(_ROWS_AT_ONCE)
        return torch.cat([rows.to(torch.float32, copy=True) @ removed for rows in parts])
