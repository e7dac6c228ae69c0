"""Dynamic methods: choose for every batch, from states that a probe (or the whole batch) shows."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor

from pp_lightning.errors import UserError
from pp_lightning.functional.draws import ScatteredProbe
from pp_lightning.functional.moments import TokenPositions
from pp_lightning.functional.probe import Probe
from pp_lightning.functional.scores import ppsp_unit_scores, ppsp_weight_norm
from pp_lightning.methods.base import BOTH_BLOCKS, BlockName, PruningMethod, UnitName
from pp_lightning.prefill import Prefill

ProbeSource = Literal["current", "previous"]
AnyProbe = Probe | ScatteredProbe


class ProbeObservation(NamedTuple):
    """What a method makes of a probe's states.

    Attributes:
        energy: (C,) float32, what units are scored by.
        restored: (C,) float32, the mean that is put back for each channel that goes; None puts nothing back.
    """

    energy: Tensor
    restored: Tensor | None = None


class DynamicMethod(PruningMethod):
    """Chooses per batch. The pruned layers call these hooks; all of them trace into static graphs.

    Args:
        probe_source: take the probe from the ``current`` residual or from the ``previous`` one (parallel probing).
        blocks: which blocks are pruned, ``attention``, ``mlp`` or both.
        attention_unit: ``query_head`` or ``kv_group``; None takes groups where query heads share key/value heads.

    Attributes:
        keeps_history: whether each pruned block carries a running second moment, started from the statistics.
        weighs_tokens: whether :meth:`select` is told of each token's importance: what an MLP's input projections make
            of it, and the attention that it got in the layer in front.
        momentum: m of the history's update ``H = m H + (1 - m) X^2``.
        seed: of the probes that are drawn at random.
        prefill: how a prompt runs, unless :func:`~pp_lightning.prune_` is told.
    """

    keeps_history: ClassVar[bool] = True
    weighs_tokens: ClassVar[bool] = False
    momentum: float = 0.99
    seed: int = 0
    prefill: Prefill = "probe"

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

    @property
    def keeps_mean(self) -> bool:
        """Whether each pruned block also carries a running mean, started from the statistics."""
        return False

    @property
    def centres(self) -> bool:
        """Whether scores are of deviations from a mean, so that a history of second moments alone gives none."""
        return False

    @property
    def ranks_by_input(self) -> bool:
        """Whether :meth:`select` looks at ``normed``. If not, the probe alone is normalised in parallel probing."""
        return True

    @abstractmethod
    def probe_sizes(self, num_rows: int, num_tokens: int) -> tuple[int, int]:
        """Rows and tokens of the probe of a (B, S) batch: what FLOPs are counted from."""

    def samples_needed(self, num_rows: int, num_tokens: int) -> int:
        """How many samples (uniform numbers) :meth:`select` draws the probe of a (B, S) batch with."""
        return 0

    @abstractmethod
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
    ) -> AnyProbe | None:
        """The part of the batch that runs ahead; None means all of it.

        Args:
            residual: (B, S, D), before the block's norm.
            normed: (B, S, D), after it.
            real: (B, S) bool, None where there is no padding.
            sizes: what :meth:`probe_sizes` gives for this batch, where the caller has it.
            samples: as many uniform numbers (float32) as :meth:`samples_needed` says, new ones for every choice.
            importance: (B, S) float32, of each token, where the method weighs tokens and it is known.
            mixes_tokens: whether the block's front half lets tokens see each other, as attention does.
        """

    @abstractmethod
    def observe(
        self,
        states: Tensor,
        probe: AnyProbe | None,
        places: TokenPositions | None,
        history: Tensor | None,
        running_mean: Tensor | None,
    ) -> ProbeObservation:
        """What units are scored by, and the means to put back.

        Args:
            states: the probe's states (b, s, C).
            probe: where in the batch they come from; None where they are those of the whole batch.
            places: positions of the whole batch; None where column and position are the same and nothing is padding.
            history: (P_max, C) float32, or None for methods without one.
            running_mean: (C,) float32, or None for methods without one.
        """

    def weight_norm(self, weight: Tensor) -> Tensor:
        """The constant part of the scores, (C,) float32, from the output matrix (D, C)."""
        return ppsp_weight_norm(weight)

    def unit_scores(self, energy: Tensor, weight_norm: Tensor, channels_per_unit: int) -> Tensor:
        """Scores (U,) of a block's units: PPsp."""
        return ppsp_unit_scores(energy, weight_norm, channels_per_unit)


class WholeBatchMethod(DynamicMethod):
    """Chooses by the states of the whole batch. No history and no calibration.

    Args:
        blocks: which blocks are pruned, ``attention``, ``mlp`` or both.
        attention_unit: ``query_head`` or ``kv_group``; None takes groups where query heads share key/value heads.
    """

    needs_statistics: ClassVar[bool] = False
    keeps_history: ClassVar[bool] = False

    def __init__(self, blocks: Sequence[BlockName] = BOTH_BLOCKS, attention_unit: UnitName | None = None) -> None:
        super().__init__("current", blocks, attention_unit)

    def probe_sizes(self, num_rows: int, num_tokens: int) -> tuple[int, int]:
        """All rows and tokens."""
        return num_rows, num_tokens

    def select(self, *_: object, **__: object) -> AnyProbe | None:
        """Everything."""
        return None
