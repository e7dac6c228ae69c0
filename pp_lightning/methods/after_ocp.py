"""After Outlier-Centric Probing (ACL 2026 long 276), the successor of Probe Pruning, whose abstract alone was at hand.

What its abstract names is here; its formulas are ours, and figures of it say nothing about the published method.
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from pp_lightning.functional.budget import probe_rows, probe_tokens
from pp_lightning.functional.moments import TokenPositions, fused_energy
from pp_lightning.functional.probe import select_probe, token_norms
from pp_lightning.methods.base import BOTH_BLOCKS, AllocationName, BlockName, UnitName
from pp_lightning.methods.dynamic import AnyProbe, DynamicMethod, ProbeObservation
from pp_lightning.methods.options import checked_part, checked_weight
from pp_lightning.prefill import Prefill


class AfterOCP(DynamicMethod):
    """Dynamic: Probe Pruning's score and history on a probe of the tokens that trigger outliers.

    The tokens of an MLP's probe have the largest sensitivity ``sqrt(sum_d x_d^2 a_d)``, where ``a_d`` adds up the
    squares of what the input projections multiply feature d with: what a token makes of the first matrices, as if
    features were not correlated. Those of attention's probe got most attention in the layer in front, over its heads
    and queries; the first layer, which has none, takes the residual's norm. Ratios per layer come from how much of the
    calibrated states is in outliers (``allocation="outliers"``), and do not move with the batches.

    The model computes attention eagerly while it is pruned: no other implementation tells who was attended.

    Args:
        token_ratio: fraction of the batch's tokens in the probe.
        row_ratio: fraction of the batch's rows in the probe.
        momentum: m of the history's update ``H = m H + (1 - m) X^2``.
        allocation: ``outliers``, ``uniform`` or ``global``: see ``prune_``, where it can be overruled.
        prefill: how a prompt runs: see ``prune_``, where it can be overruled.
        blocks: which blocks are pruned, ``attention``, ``mlp`` or both.
        attention_unit: ``query_head`` or ``kv_group``; None takes groups where query heads share key/value heads.
    """

    label: ClassVar[str] = "after_ocp"
    weighs_tokens: ClassVar[bool] = True

    def __init__(
        self,
        token_ratio: float = 0.5,
        row_ratio: float = 0.05,
        momentum: float = 0.99,
        allocation: AllocationName = "outliers",
        prefill: Prefill = "probe",
        blocks: Sequence[BlockName] = BOTH_BLOCKS,
        attention_unit: UnitName | None = None,
    ) -> None:
        super().__init__("current", blocks, attention_unit)
        self.token_ratio = checked_part("token_ratio", token_ratio)
        self.row_ratio = checked_part("row_ratio", row_ratio)
        self.momentum = checked_weight("momentum", momentum)
        self.allocation = allocation
        self.prefill = prefill

    def probe_sizes(self, num_rows: int, num_tokens: int) -> tuple[int, int]:
        """Rows and tokens of the probe of a (B, S) batch: as many as Probe Pruning's."""
        return probe_rows(num_rows, self.row_ratio), probe_tokens(num_tokens, self.token_ratio)

    @property
    def ranks_by_input(self) -> bool:
        """Importance is told."""
        return False

    def select(
        self,
        residual: Tensor,
        normed: Tensor,
        real: Tensor | None,
        sizes: tuple[int, int] | None = None,
        *,
        samples: Tensor | None = None,
        importance: Tensor | None = None,
        mixes_tokens: bool = True,
    ) -> AnyProbe:
        """The tokens, then the rows, of largest importance."""
        ranked = token_norms(residual) if importance is None else importance
        return select_probe(ranked, real, self.row_ratio, self.token_ratio, sizes)

    def observe(
        self,
        states: Tensor,
        probe: AnyProbe | None,
        places: TokenPositions | None,
        history: Tensor | None,
        running_mean: Tensor | None,
    ) -> ProbeObservation:
        """The probe's moment fused with the history by importance, as in Probe Pruning."""
        assert history is not None
        return ProbeObservation(fused_energy(states, probe, places, history, None)[0])
