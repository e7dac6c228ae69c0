"""Dynamic methods: choose for every batch, from states that a probe (or the whole batch) shows."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor

from pp_lightning.errors import UserError
from pp_lightning.functional.moments import Places
from pp_lightning.functional.probe import Probe
from pp_lightning.functional.scores import ppsp_unit_scores
from pp_lightning.methods.base import BOTH_BLOCKS, BlockName, PruningMethod, UnitName

ProbeSource = Literal["current", "previous"]


class DynamicMethod(PruningMethod):
    """Chooses per batch. The pruned layers call these hooks; all of them trace into static graphs.

    Args:
        probe_source: take the probe from the ``current`` residual or from the ``previous`` one (parallel probing).
        blocks: which blocks are pruned, ``attention``, ``mlp`` or both.
        attention_unit: ``query_head`` or ``kv_group``; None takes groups where query heads share key/value heads.

    Attributes:
        keeps_history: whether each pruned block carries a running second moment, started from the statistics.
        momentum: m of the history's update ``H = m H + (1 - m) X^2``.
    """

    keeps_history: ClassVar[bool] = True
    momentum: float = 0.99

    def __init__(
        self,
        probe_source: ProbeSource = "current",
        blocks: Sequence[BlockName] = BOTH_BLOCKS,
        attention_unit: UnitName | None = None,
    ) -> None:
        super().__init__(blocks, attention_unit)
        if probe_source not in ("current", "previous"):
            raise UserError(f"probe_source must be current or previous, not {probe_source!r}")
        self.probe_source: ProbeSource = probe_source

    @abstractmethod
    def probe_sizes(self, num_rows: int, num_tokens: int) -> tuple[int, int]:
        """Rows and tokens of the probe of a (B, S) batch: what FLOPs are counted from."""

    @abstractmethod
    def select(
        self, residual: Tensor, normed: Tensor, real: Tensor | None, sizes: tuple[int, int] | None = None
    ) -> Probe | None:
        """The part of the batch that runs ahead; None means all of it.

        Args:
            residual: (B, S, D), before the block's norm.
            normed: (B, S, D), after it.
            real: (B, S) bool, None where there is no padding.
            sizes: what :meth:`probe_sizes` gives for this batch, where the caller has it.
        """

    @abstractmethod
    def energy(self, states: Tensor, probe: Probe | None, places: Places | None, history: Tensor | None) -> Tensor:
        """The second moment of each channel that scores are made from: (C,) float32, summed over positions.

        Args:
            states: the probe's states (b, s, C).
            probe: where in the batch they come from.
            places: positions of the whole batch; None where column and position are the same and nothing is padding.
            history: (P_max, C) float32, or None for methods without one.
        """

    def unit_scores(self, energy: Tensor, weight_norm: Tensor, channels_per_unit: int) -> Tensor:
        """Scores (U,) of a block's units: PPsp."""
        return ppsp_unit_scores(energy, weight_norm, channels_per_unit)
