"""Methods that note what they saw and decided, block after block, in the order in which the model runs them."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pp_lightning.functional.probe import Probe
from pp_lightning.methods import FullBatchProbing, ProbePruning, WandaSP
from pp_lightning.methods.dynamic import ProbeObservation


@dataclass
class Record:
    """One choice: of one block of one layer for one batch."""

    probe: Probe | None = None
    states: Tensor | None = None
    energy: Tensor | None = None
    scores: Tensor | None = None


class Recording:
    """Mixed into a dynamic method: fills ``records``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.records: list[Record] = []

    def select(self, *args: Any, **more: Any) -> Probe | None:
        self.records.append(Record(probe=super().select(*args, **more)))  # type: ignore[misc]
        return self.records[-1].probe

    def observe(self, states: Tensor, *args: Any) -> ProbeObservation:
        record, found = self.records[-1], super().observe(states, *args)  # type: ignore[misc]
        record.states, record.energy = states.clone(), found.energy
        return found

    def unit_scores(self, *args: Any) -> Tensor:
        self.records[-1].scores = super().unit_scores(*args)  # type: ignore[misc]
        return self.records[-1].scores

    def taken(self, layers: tuple[int, ...]) -> dict[tuple[int, str], Record]:
        """The records of one batch by (layer, block), and a clean slate for the next."""
        keys = [(layer, block) for layer in layers for block in ("attention", "mlp")]
        records, self.records = self.records, []
        return dict(zip(keys, records, strict=True))


class RecordingProbePruning(Recording, ProbePruning):
    """Probe Pruning, watched."""


class RecordingFullBatchProbing(Recording, FullBatchProbing):
    """Full-Batch Probing, watched."""


class RecordingWandaSP(WandaSP):
    """Wanda-sp, watched: scores by (layer, block)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scores: dict[tuple[int, str], Tensor] = {}

    def unit_scores(self, block: Any, statistics: Any) -> Tensor:
        scores = super().unit_scores(block, statistics)
        self.scores[block.layer, block.plan.block.value] = scores
        return scores
