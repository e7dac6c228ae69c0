"""LLM-Pruner: Taylor importance of coupled weights from one backward pass (arXiv 2305.11627)."""

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pp_lightning.blocks import Block
from pp_lightning.errors import UserError
from pp_lightning.functional.members import Reduction, reduced_unit_scores
from pp_lightning.functional.selection import keep_best
from pp_lightning.functional.taylor import Taylor
from pp_lightning.importances import Importances
from pp_lightning.methods.base import BOTH_BLOCKS, BlockName, BlockToPrune, StaticChoice, UnitName
from pp_lightning.methods.gradient import GradientMethod
from pp_lightning.methods.options import checked
from pp_lightning.methods.ranking import ranked_counts

TaylorName = Literal["vectorize", "param_first", "param_second", "param_mix"]
ReductionName = Literal["sum", "mean", "max", "prod"]
Range = tuple[int, int]


class LLMPruner(GradientMethod):
    """Static: a unit is as important as the loss is sensitive to its weights, over all matrices that it has a part in.

    Args:
        taylor: terms of the expansion: ``param_first`` (as published), ``vectorize``, ``param_second``, ``param_mix``.
        reduction: over the matrices of a block: ``sum`` (as published), ``mean``, ``max`` or ``prod``.
        global_ranking: one ranking of all units of all blocks by their raw scores, instead of the same ratio in each
            block. A head has many more weights than a channel, so this takes mostly channels.
        attention_layers: prune attention from the first of these layers up to, not including, the second; the others
            keep all heads and nothing makes up for them. None takes all that are not skipped.
        mlp_layers: the same for MLPs.
        samples: calibration windows for the backward pass.
        window: tokens of each, no more than the data's own window.
        blocks: which blocks are pruned, ``attention``, ``mlp`` or both.
        attention_unit: ``query_head`` or ``kv_group``; None takes groups where query heads share key/value heads.
    """

    label: ClassVar[str] = "llm_pruner"

    def __init__(
        self,
        taylor: TaylorName = "param_first",
        reduction: ReductionName = "sum",
        global_ranking: bool = False,
        attention_layers: Range | None = None,
        mlp_layers: Range | None = None,
        samples: int = 10,
        window: int = 64,
        blocks: Sequence[BlockName] = BOTH_BLOCKS,
        attention_unit: UnitName | None = None,
    ) -> None:
        super().__init__(blocks, attention_unit)
        if samples < 1 or window < 2:
            raise UserError("samples must be at least 1 and window at least 2")
        for name, layers in (("attention_layers", attention_layers), ("mlp_layers", mlp_layers)):
            if layers is not None and not 0 <= layers[0] < layers[1]:
                raise UserError(f"{name} must be a first layer and a later one to stop before, not {list(layers)}")
        self.taylor = Taylor(checked("taylor", taylor, [variant.value for variant in Taylor]))
        self.reduction = Reduction(checked("reduction", reduction, [way.value for way in Reduction]))
        self.global_ranking = global_ranking
        self.attention_layers = attention_layers
        self.mlp_layers = mlp_layers
        self.samples = samples
        self.window = window

    @property
    def kind(self) -> str:
        """The variant of the expansion."""
        return self.taylor.value

    @property
    def allocates(self) -> bool:
        """With a global ranking, or ranges of layers."""
        return self.global_ranking or self.attention_layers is not None or self.mlp_layers is not None

    def choose(
        self, blocks: Sequence[BlockToPrune], calibration_data: Importances
    ) -> Iterator[tuple[BlockToPrune, StaticChoice]]:
        """Keep the best of each block, or of all blocks together; a block out of range keeps everything."""
        within = [block for block in blocks if self._within(block)]
        if any(block.plan.alike and not self._within(block) for block in blocks):
            raise UserError("uniform_heads wants every layer alike: leave out attention_layers")
        scores = {block.key: self.unit_scores(block, calibration_data) for block in within}
        counts = {block.key: block.plan.keep for block in within}
        if self.global_ranking:
            counts = dict(zip(scores, ranked_counts(within, list(scores.values()), by_cost=False), strict=True))
        for block in blocks:
            if block.key in scores:
                yield block, StaticChoice(keep_best(scores[block.key], counts[block.key]))
            else:
                yield block, StaticChoice(torch.arange(block.units.number, device=block.weight.device))

    def unit_scores(self, block: BlockToPrune, calibration_data: Importances) -> Tensor:
        """Scores (U,) float32 of a block's units."""
        members = [vector.to(block.weight.device) for vector in calibration_data.of(block.key, self.kind)]
        return block.informative(reduced_unit_scores(members, block.units.number, self.reduction))

    def _within(self, block: BlockToPrune) -> bool:
        layers = self.attention_layers if block.plan.block is Block.ATTENTION else self.mlp_layers
        return layers is None or layers[0] <= block.layer < layers[1]
