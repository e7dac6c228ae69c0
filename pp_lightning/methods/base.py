"""What a pruning method is: a policy without state. One file a method."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Generic, Literal, Self, TypeVar

import torch
from torch import Tensor

from pp_lightning.blocks import AttentionUnit, Block, BlockKey, BlockPlan, Units
from pp_lightning.calibration_data import CalibrationData
from pp_lightning.errors import UserError
from pp_lightning.functional.budget import rounded_up
from pp_lightning.functional.selection import keep_best
from pp_lightning.statistics import Statistics

BlockName = Literal["attention", "mlp"]
UnitName = Literal["query_head", "kv_group"]
AllocationName = Literal["uniform", "global", "outliers", "searched"]
BOTH_BLOCKS: tuple[BlockName, ...] = ("attention", "mlp")
E = TypeVar("E", bound=CalibrationData)


class PruningMethod(ABC):
    """A way to choose units. Methods hold settings only; everything that changes lives in the pruned model.

    Args:
        blocks: which blocks are pruned, ``attention``, ``mlp`` or both.
        attention_unit: ``query_head`` or ``kv_group``; None takes groups where query heads share key/value heads.

    Attributes:
        label: short name for tables and the command line.
        needs_statistics: whether :func:`~pp_lightning.prune_` must be given something to choose from.
        calibration_data: what that is: calibration statistics, or gradient importances.
        updates: whether the weights that stay are meant to take over what goes (``update`` of ``prune_``).
        splits_groups: whether it can choose single query heads where several share a key/value head.
        allocation: how the removed units are spread over the layers, unless :func:`~pp_lightning.prune_` is told.
    """

    label: ClassVar[str]
    needs_statistics: ClassVar[bool] = True
    calibration_data: ClassVar[type[CalibrationData]] = Statistics
    allocation: AllocationName = "uniform"
    splits_groups: ClassVar[bool] = True
    updates: ClassVar[bool] = False

    def __init__(self, blocks: Sequence[BlockName] = BOTH_BLOCKS, attention_unit: UnitName | None = None) -> None:
        unknown = set(blocks) - set(BOTH_BLOCKS)
        if unknown or not blocks:
            raise UserError(f"blocks must name attention, mlp or both, not {list(blocks)}")
        if attention_unit not in (None, "query_head", "kv_group"):
            raise UserError(f"attention_unit must be query_head or kv_group, not {attention_unit!r}")
        self.blocks = tuple(Block(name) for name in BOTH_BLOCKS if name in blocks)
        self.attention_unit = None if attention_unit is None else AttentionUnit(attention_unit)

    @property
    def needs_means(self) -> bool:
        """Whether calibration statistics must include means beside second moments."""
        return False

    @property
    def restores_means(self) -> bool:
        """Whether a block's output gets back what its removed channels contribute on average."""
        return False

    @property
    def allocates(self) -> bool:
        """Whether the method itself counts what stays in each layer."""
        return False

    def with_uniform_counts(self) -> Self:
        """The method with the same counts in every pruned layer."""
        if self.allocation == "uniform":
            return self
        method = copy(self)
        method.allocation = "uniform"
        return method

    def settings(self) -> dict[str, object]:
        """The settings by name, in plain types, for result files."""
        plain = {name: value.value if isinstance(value, Enum) else value for name, value in vars(self).items()}
        return {**plain, "blocks": [block.value for block in self.blocks]}


@dataclass(frozen=True)
class BlockToPrune:
    """One block of one layer as a static method sees it.

    Attributes:
        plan: its units, and how many stay under uniform ratios.
        output: the output matrix, (D, C), or what makes or reads it.
        over: makes of scores (U,) those that all processes count units by, where several share the block.
    """

    layer: int
    plan: BlockPlan
    output: Tensor | Callable[[], Tensor]
    over: Callable[[Tensor], Tensor] | None = None

    @property
    def weight(self) -> Tensor:
        """The output matrix, (D, C)."""
        return self.output if isinstance(self.output, Tensor) else self.output()

    @property
    def key(self) -> BlockKey:
        """Key of this block's statistics."""
        return self.layer, self.plan.block

    @property
    def units(self) -> Units:
        """The block's units."""
        return self.plan.units

    def checked(self, scores: Tensor) -> Tensor:
        """``scores``, or an error: a NaN would silently rank first."""
        if not torch.isfinite(scores).all():
            block = f"the {self.plan.block.value} block of layer {self.layer}"
            raise UserError(f"scores of {block} are not finite: check the checkpoint's weights")
        return scores

    def informative(self, scores: Tensor) -> Tensor:
        """``scores``, or an error: where all are zero, any choice would be arbitrary."""
        if not self.checked(scores).any():
            block = f"the {self.plan.block.value} block of layer {self.layer}"
            raise UserError(f"scores of {block} are all zero, any choice would be arbitrary: use other text or float32")
        return scores

    def counted(self, scores: Tensor) -> Tensor:
        """The scores (U,) that units are counted by: their own, unless processes share the block."""
        return scores if self.over is None else self.over(scores)

    def rounded(self, kept: int) -> int:
        """A count of kept units as it can be: up to a multiple of ``round_to``, at least one of them."""
        return rounded_up(kept, self.units.number, self.plan.round_to)


@dataclass(frozen=True)
class StaticChoice:
    """The units that stay for good.

    Attributes:
        kept: (K,) int64, ascending.
        bias: added to the block's output, (D,) float32, or None.
        columns: new columns of the output matrix for the channels that stay, (D, K * c) float32; None keeps them.
    """

    kept: Tensor
    bias: Tensor | None = None
    columns: Tensor | None = None


class StaticMethod(PruningMethod, Generic[E]):
    """Chooses once, from calibration data of one kind: calibration statistics, or gradient importances."""

    def choose(
        self, blocks: Sequence[BlockToPrune], calibration_data: E
    ) -> Iterator[tuple[BlockToPrune, StaticChoice]]:
        """Choose for every block; all are scored before the first choice is given, so that a mistake changes nothing.

        The default scores each block with :meth:`unit_scores` and keeps the best ``keep`` of each.
        """
        choices = [
            StaticChoice(keep_best(self.unit_scores(block, calibration_data), block.plan.keep)) for block in blocks
        ]
        yield from zip(blocks, choices, strict=True)

    @abstractmethod
    def unit_scores(self, block: BlockToPrune, calibration_data: E) -> Tensor:
        """Scores (U,) float32 of a block's units; larger stays."""
