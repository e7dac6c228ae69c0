"""What an evaluation leaves behind, for machines: figures with everything needed to repeat them."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Milliseconds a batch: the median and the spread over full-size batches, vocabulary projection included."""

    median: float
    fastest: float
    slowest: float
    batches: int

    @staticmethod
    def of(milliseconds: list[float]) -> "Timing":
        """Summary of at least one measurement; the first is left out where there are others (warm-up)."""
        kept = sorted(milliseconds[1:] or milliseconds)
        return Timing(statistics.median(kept), kept[0], kept[-1], len(kept))


@dataclass(frozen=True)
class FlopsRatios:
    """FLOPs relative to the dense model's, over all batches of an evaluation, probe included.

    Attributes:
        layers: without the vocabulary projection.
        probe: FLOPs of the probes over dense ``layers``.
        after_prompt: as ``model``, of the tokens behind the prompts alone; None where the protocol has none.
    """

    model: float
    layers: float
    probe: float
    after_prompt: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """One model state evaluated on one data module.

    Attributes:
        method: label of the method, ``dense`` for none.
        kept: smallest and largest count of kept units over the pruned layers, by block.
        perplexity: on a text; the mean of ``perplexities``, one a seed, where there are several.
        tokens: predicted tokens of the text.
        tasks: results of multiple-choice tasks, as ``TaskResults.as_dict`` has them.
        compiled: graphs, seconds and reasons of recompilations, as ``Compilation.as_dict`` has them.
        perplexity_error: the standard error of the mean.
        overlap: mean Jaccard index with the units that Full-Batch Probing keeps, by layer and block.
    """

    method: str
    pruning_ratio: float
    flops: FlopsRatios
    kept: dict[str, tuple[int, int]] = field(default_factory=dict)
    settings: dict[str, object] = field(default_factory=dict)
    perplexity: float | None = None
    tokens: int | None = None
    time: Timing | None = None
    tasks: dict[str, Any] | None = None
    compiled: dict[str, Any] | None = None
    perplexities: list[float] | None = None
    perplexity_error: float | None = None
    overlap: dict[str, float] | None = None

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Evaluation":
        """An evaluation from what ``asdict`` made of it and JSON kept."""
        time = values["time"] and Timing(**values["time"])
        kept = {block: (low, high) for block, (low, high) in values["kept"].items()}
        return Evaluation(**{**values, "flops": FlopsRatios(**values["flops"]), "time": time, "kept": kept})

    @staticmethod
    def mean_of(evaluations: Sequence["Evaluation"]) -> "Evaluation":
        """One row, evaluated with several seeds: mean perplexity and overlap, all else of the first."""
        first = evaluations[0]
        values = [one.perplexity for one in evaluations if one.perplexity is not None]
        if len(evaluations) < 2 or len(values) < len(evaluations):
            return first
        mean, error = _mean(values)
        shares = [one.overlap or {} for one in evaluations]
        overlap = first.overlap and {name: statistics.fmean(one[name] for one in shares) for name in first.overlap}
        return replace(first, perplexity=mean, perplexities=values, perplexity_error=error, overlap=overlap)

    def single_numbers(self) -> dict[str, float]:
        """The figures that a logger can hold."""
        numbers = {"flops_ratio": self.flops.model, "probe_share": self.flops.probe}
        if self.perplexity is not None:
            numbers["perplexity"] = self.perplexity
        if self.time is not None:
            numbers["ms_per_batch"] = self.time.median
        if self.tasks is not None:
            numbers |= {f"mean_{name}": self.tasks["mean"][name] for name in ("acc", "acc_norm", "acc_token")}
        return numbers

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for ``results.json``; what does not apply is left out."""
        ratios = {
            "flops_ratio": self.flops.model,
            "flops_ratio_layers": self.flops.layers,
            "probe_share": self.flops.probe,
        }
        if self.flops.after_prompt is not None:
            ratios["flops_ratio_after_prompt"] = self.flops.after_prompt
        own = {key: value for key, value in asdict(self).items() if key != "flops" and value is not None}
        return {**own, **ratios}


@dataclass(frozen=True)
class Comparison:
    """An evaluation beside the dense model's, from the same run; without one there is nothing to compare with.

    Attributes:
        degradation: perplexity above the dense model's.
        time_ratio: time over dense time.
        efficiency: FLOPs ratio over time ratio; 1 means every saved operation became saved time.
        prr: perplexity lost per millisecond saved, ``(ppl - ppl_dense) / (time_dense - time)``, where any is saved.
        difference: perplexity above that of the first pruned row at this ratio, over the same seeds, pair by pair.
        difference_error: the standard error of that.
    """

    evaluation: Evaluation
    degradation: float | None = None
    time_ratio: float | None = None
    efficiency: float | None = None
    prr: float | None = None
    difference: float | None = None
    difference_error: float | None = None

    @staticmethod
    def of(evaluation: Evaluation, dense: Evaluation, first: Evaluation | None = None) -> "Comparison":
        """Compare a row with the dense row, and with the first pruned one."""
        if evaluation.perplexity is None or dense.perplexity is None:
            return Comparison(evaluation)
        degradation = evaluation.perplexity - dense.perplexity
        found = Comparison(evaluation, degradation)
        if first is not None and first.perplexities is not None and evaluation.perplexities is not None:
            pairs = [one - other for one, other in zip(evaluation.perplexities, first.perplexities, strict=True)]
            difference, error = _mean(pairs)
            found = replace(found, difference=difference, difference_error=error)
        if evaluation.time is None or dense.time is None:
            return found
        time_ratio = evaluation.time.median / dense.time.median
        saved = dense.time.median - evaluation.time.median
        prr = degradation / saved if saved > 0 else None
        return replace(found, time_ratio=time_ratio, efficiency=evaluation.flops.model / time_ratio, prr=prr)

    def as_dict(self) -> dict[str, Any]:
        """One flat dictionary, the evaluation's fields included."""
        own = {key: value for key, value in vars(self).items() if key != "evaluation"}
        if self.difference is None:
            del own["difference"], own["difference_error"]
        return {**self.evaluation.as_dict(), **own}


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of at least two values."""
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5
