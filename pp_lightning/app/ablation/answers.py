"""What came out for one variant of a question, over all seeds."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from pp_lightning.app.ablation.questions import Variant

Kept = dict[str, list[Tensor]]  # "layer.block" to the kept units of every batch


@dataclass(frozen=True)
class Run:
    """One variant with one seed.

    Attributes:
        seed: of the calibration windows and of drawn probes.
        perplexity: its perplexity.
        dense: the dense model's, on the same batches.
        tokens: predicted tokens.
        flops_ratio: FLOPs over dense ones, probe and vocabulary projection included.
        kept: kept units of every batch, where the question asks for them.
    """

    seed: int
    perplexity: float
    dense: float
    tokens: int
    flops_ratio: float
    kept: Kept | None = None


@dataclass(frozen=True)
class Mean:
    """A mean over seeds.

    Attributes:
        value: the mean.
        error: its standard error; None where there is one seed only.
    """

    value: float
    error: float | None

    @staticmethod
    def of(values: Sequence[float]) -> "Mean":
        """Mean and standard error of at least one value."""
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        return Mean(statistics.fmean(values), error)

    def __str__(self) -> str:
        return f"{self.value:.2f}" + ("" if self.error is None else f" ±{self.error:.2f}")


@dataclass(frozen=True)
class Answer:
    """A row of a question's table.

    Attributes:
        question: its name.
        variant: label of the variant.
        x: its place on the question's axis, where that is a number.
        line: what it shares a line with in the picture.
        ratio: fraction removed.
        seeds: of the runs.
        perplexities: one a seed.
        dense: the dense model's perplexity.
        tokens: predicted tokens.
        perplexity: mean over seeds.
        difference: from the question's first variant, paired by seed: same batches, same calibration windows.
        degradation: above the dense model, over that of the question's first variant; None where that one lost nothing,
            or other tokens were scored.
        flops_ratio: FLOPs over dense ones, probe and vocabulary projection included.
        settings: of the method, with the first seed.
        overlap: mean Jaccard index with the units that Full-Batch Probing keeps, by layer and block.
    """

    question: str
    variant: str
    x: float | None
    line: str
    ratio: float
    seeds: list[int]
    perplexities: list[float]
    dense: float
    tokens: int
    perplexity: Mean
    difference: Mean
    degradation: float | None
    flops_ratio: float
    settings: dict[str, Any]
    overlap: dict[str, float] | None

    @staticmethod
    def of(
        question: str,
        variant: Variant,
        ratio: float,
        runs: Sequence[Run],
        first: Sequence[Run],
        overlaps: Sequence[dict[str, float]] | None,
    ) -> "Answer":
        """Sum up the runs of a variant (one a seed) beside those of the question's first variant."""
        perplexities, against = [run.perplexity for run in runs], [run.perplexity for run in first]
        dense = runs[0].dense
        method = variant.method(runs[0].seed)
        mean, lost = Mean.of(perplexities), Mean.of(against).value - first[0].dense
        return Answer(
            question=question,
            variant=variant.label,
            x=variant.x,
            line=variant.line,
            ratio=ratio,
            seeds=[run.seed for run in runs],
            perplexities=perplexities,
            dense=dense,
            tokens=runs[0].tokens,
            perplexity=mean,
            difference=Mean.of([a - b for a, b in zip(perplexities, against, strict=True)]),
            degradation=(mean.value - dense) / lost if lost > 0 and dense == first[0].dense else None,
            flops_ratio=runs[0].flops_ratio,
            settings={"method": method.label, **method.settings()},
            overlap=None if overlaps is None else {k: Mean.of([o[k] for o in overlaps]).value for k in overlaps[0]},
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for ``ablation.json``."""
        return asdict(self)
