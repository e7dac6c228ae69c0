"""Probe Pruning (ICLR 2025, arXiv 2502.15618): a small probe of each batch, fused with a running history, chooses."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor

from pp_lightning.errors import UserError
from pp_lightning.functional.budget import probe_rows, probe_tokens
from pp_lightning.functional.moments import Places, fuse, placed_second_moment, positions_held, second_moment
from pp_lightning.functional.probe import Probe, select_probe, token_norms
from pp_lightning.methods.base import BOTH_BLOCKS, BlockName, UnitName
from pp_lightning.methods.dynamic import DynamicMethod, ProbeSource


class ProbePruning(DynamicMethod):
    """Dynamic: the published method, with the decisions of 01-method, section 3.

    Args:
        token_ratio: fraction of the batch's tokens in the probe.
        row_ratio: fraction of the batch's rows in the probe.
        momentum: m of the history's update ``H = m H + (1 - m) X^2``; 1 keeps the history as calibrated.
        fusion_weight: weight of the probe against the history, in [0, 1]; None scales by importance, ``P / (P + H)``.
        probe_source: ``current`` probes the residual that enters the block; ``previous`` an earlier one, so that the
            probe need not wait (parallel probing).
        rank_by: choose the probe by the norm of the ``residual`` or of the block's normalised ``input``.
        blocks: which blocks are pruned, ``attention``, ``mlp`` or both.
        attention_unit: ``query_head`` or ``kv_group``; None takes groups where query heads share key/value heads.
    """

    label: ClassVar[str] = "pp"

    def __init__(
        self,
        token_ratio: float = 0.5,
        row_ratio: float = 0.05,
        momentum: float = 0.99,
        fusion_weight: float | None = None,
        probe_source: ProbeSource = "current",
        rank_by: Literal["residual", "input"] = "residual",
        blocks: Sequence[BlockName] = BOTH_BLOCKS,
        attention_unit: UnitName | None = None,
    ) -> None:
        super().__init__(probe_source, blocks, attention_unit)
        for name, value in (("token_ratio", token_ratio), ("row_ratio", row_ratio)):
            if not 0.0 < value <= 1.0:
                raise UserError(f"{name} must be in (0, 1], not {value}")
        for name, weight in (("momentum", momentum), ("fusion_weight", fusion_weight)):
            if weight is not None and not 0.0 <= weight <= 1.0:
                raise UserError(f"{name} must be in [0, 1], not {weight}")
        if rank_by not in ("residual", "input"):
            raise UserError(f"rank_by must be residual or input, not {rank_by!r}")
        self.token_ratio = token_ratio
        self.row_ratio = row_ratio
        self.momentum = momentum
        self.fusion_weight = fusion_weight
        self.rank_by = rank_by

    def probe_sizes(self, num_rows: int, num_tokens: int) -> tuple[int, int]:
        """Rows and tokens of the probe of a (B, S) batch."""
        return probe_rows(num_rows, self.row_ratio), probe_tokens(num_tokens, self.token_ratio)

    def select(
        self, residual: Tensor, normed: Tensor, real: Tensor | None, sizes: tuple[int, int] | None = None
    ) -> Probe:
        """The tokens, then the rows, with the largest norms (steps 1 and 2)."""
        ranked = residual if self.rank_by == "residual" else normed
        return select_probe(token_norms(ranked), real, self.row_ratio, self.token_ratio, sizes)

    def energy(self, states: Tensor, probe: Probe | None, places: Places | None, history: Tensor | None) -> Tensor:
        """The probe's moment fused with the history at the selected positions, summed over them (step 4)."""
        assert probe is not None and history is not None
        if places is None:
            return fuse(second_moment(states), history[probe.tokens], self.fusion_weight).sum(0)
        assert probe.real is not None and probe.real_tokens is not None
        moment, _ = placed_second_moment(states, Places(probe.take(places.positions), probe.real, places.num_positions))
        selected = positions_held(places, probe.tokens, probe.real_tokens)
        fused = fuse(moment, history[: places.num_positions], self.fusion_weight)
        return (fused * selected[:, None]).sum(0)
