"""Probe Pruning (ICLR 2025, arXiv 2502.15618): a small probe of each batch, fused with a running history, chooses."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from pp_lightning.functional import draws
from pp_lightning.functional.budget import probe_rows, probe_tokens
from pp_lightning.functional.compensation import channel_mean
from pp_lightning.functional.moments import TokenPositions, fused_energy
from pp_lightning.functional.probe import select_probe, token_norms
from pp_lightning.functional.scores import energy_about
from pp_lightning.methods.base import BOTH_BLOCKS, AllocationName, BlockName, UnitName
from pp_lightning.methods.dynamic import AnyProbe, DynamicMethod, ProbeObservation, ProbeSource
from pp_lightning.methods.options import (
    COMPENSATIONS,
    DRAWS,
    SCORES,
    CompensationName,
    RankingName,
    ScoreName,
    checked,
    checked_part,
    checked_weight,
)
from pp_lightning.prefill import Prefill


class ProbePruning(DynamicMethod):
    """Dynamic: the published method by default, and what goes beyond it.

    :meth:`paper` and :meth:`best` name the two settings that matter. What is not the paper's: ``random`` and
    ``stratified`` probes, ``score``, ``compensation``, ``scattered_mlp`` and ``allocation``.

    Args:
        token_ratio: fraction of the batch's tokens in the probe.
        row_ratio: fraction of the batch's rows in the probe.
        momentum: m of the history's update ``H = m H + (1 - m) X^2``; 1 keeps the history as calibrated.
        fusion_weight: weight of the probe against the history, in [0, 1]; None scales by importance, ``P / (P + H)``.
        probe_source: ``current`` probes the residual that enters the block; ``previous`` an earlier one, so that the
            probe need not wait (parallel probing).
        rank_by: choose the probe by the norm of the ``residual`` or of the block's normalised ``input``, or draw it:
            ``random``, every set of rows and tokens equally likely, or ``stratified``, one from each equal stretch.
        score: ``ppsp`` as published; ``energy``, what a unit adds to the block's output in squares; ``centered``, the
            same of its deviation from the mean that is restored.
        compensation: what is put back for removed channels: their mean in the ``probe``, their running mean
            (``history``), or nothing (None).
        scattered_mlp: probe MLPs with as many single tokens, drawn from all over the batch.
        allocation: ``uniform``, the same ratio in every layer that is not skipped, or ``global``: see ``prune_``, where
            it can be overruled.
        seed: of the probes that are drawn.
        prefill: how a prompt runs: see ``prune_``, where it can be overruled.
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
        rank_by: RankingName = "residual",
        score: ScoreName = "ppsp",
        compensation: CompensationName | None = None,
        scattered_mlp: bool = False,
        allocation: AllocationName = "uniform",
        seed: int = 0,
        prefill: Prefill = "probe",
        blocks: Sequence[BlockName] = BOTH_BLOCKS,
        attention_unit: UnitName | None = None,
    ) -> None:
        super().__init__(probe_source, blocks, attention_unit)
        self.token_ratio = checked_part("token_ratio", token_ratio)
        self.row_ratio = checked_part("row_ratio", row_ratio)
        self.momentum = checked_weight("momentum", momentum)
        self.fusion_weight = None if fusion_weight is None else checked_weight("fusion_weight", fusion_weight)
        self.rank_by = checked("rank_by", rank_by, ("residual", "input", *DRAWS))
        self.score = checked("score", score, SCORES)
        self.compensation = None if compensation is None else checked("compensation", compensation, COMPENSATIONS)
        self.scattered_mlp = scattered_mlp
        self.allocation = checked("allocation", allocation, ("uniform", "global"))
        self.seed = seed
        self.prefill = prefill

    @classmethod
    def paper(cls) -> "ProbePruning":
        """The published method: what the defaults are."""
        return cls()

    @classmethod
    def best(cls, seed: int = 0, *, generation: bool = False) -> "ProbePruning":
        """What came out best at the cost of the published method; ours, not the paper's (docs/beyond.md).

        Args:
            seed: of the probes.
            generation: what came out best for the tokens behind a prompt: it runs dense, chooses by its own states,
                and counts a little more than the history.
        """
        return cls(
            token_ratio=0.25,
            row_ratio=0.1,
            fusion_weight=0.6 if generation else 0.75,
            rank_by="stratified",
            score="centered",
            compensation="probe",
            allocation="global",
            seed=seed,
            prefill="dense" if generation else "probe",
        )

    @property
    def restores_means(self) -> bool:
        """Whether there is a compensation."""
        return self.compensation is not None

    @property
    def keeps_mean(self) -> bool:
        """Whether the compensation needs a running mean."""
        return self.compensation == "history"

    @property
    def needs_means(self) -> bool:
        """Whether calibration must collect means: to start a running mean from, or to allocate by what is restored."""
        return self.restores_means

    @property
    def centres(self) -> bool:
        """As the score says."""
        return SCORES[self.score].centred

    def probe_sizes(self, num_rows: int, num_tokens: int) -> tuple[int, int]:
        """Rows and tokens of the probe of a (B, S) batch."""
        return probe_rows(num_rows, self.row_ratio), probe_tokens(num_tokens, self.token_ratio)

    def samples_needed(self, num_rows: int, num_tokens: int) -> int:
        """None for a probe that is ranked."""
        if not (self.rank_by in DRAWS or self.scattered_mlp):
            return 0
        return draws.samples_needed(num_rows, num_tokens, *self.probe_sizes(num_rows, num_tokens))

    @property
    def ranks_by_input(self) -> bool:
        """Where the block's normalised input ranks."""
        return self.rank_by == "input" and not self.scattered_mlp

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
        """The tokens, then the rows, with the largest norms (steps 1 and 2), or a draw."""
        shape = residual.shape[:2]
        if self.scattered_mlp and not mixes_tokens:
            assert samples is not None
            rows, tokens = sizes or self.probe_sizes(*shape)
            return draws.scattered_probe(samples, shape, real, rows * tokens)
        if self.rank_by in DRAWS:
            assert samples is not None
            return draws.drawn_probe(samples, shape, real, self.row_ratio, self.token_ratio, DRAWS[self.rank_by], sizes)
        ranked = residual if self.rank_by == "residual" else normed
        return select_probe(token_norms(ranked), real, self.row_ratio, self.token_ratio, sizes)

    def observe(
        self,
        states: Tensor,
        probe: AnyProbe | None,
        places: TokenPositions | None,
        history: Tensor | None,
        running_mean: Tensor | None,
    ) -> ProbeObservation:
        """The probe's moment fused with the history at the selected positions (step 4), and the means to restore."""
        assert history is not None
        energy, count = fused_energy(states, probe, places, history, self.fusion_weight)
        centred = SCORES[self.score].centred
        if self.compensation is None and not centred:
            return ProbeObservation(energy)
        real = None if places is None else places.real
        mean = channel_mean(states, real if probe is None else probe.real)
        restored = None if self.compensation is None else COMPENSATIONS[self.compensation](mean, running_mean)
        if centred:
            energy = energy_about(energy, count, mean, mean if restored is None else restored)
        return ProbeObservation(energy, restored)

    def weight_norm(self, weight: Tensor) -> Tensor:
        """The constant part of the score."""
        return SCORES[self.score].weight_norm(weight)

    def unit_scores(self, energy: Tensor, weight_norm: Tensor, channels_per_unit: int) -> Tensor:
        """Scores (U,) of a block's units."""
        return SCORES[self.score].of_units(energy, weight_norm, channels_per_unit)
