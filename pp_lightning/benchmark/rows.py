"""A row of the table: one variant, one case, one part of the model."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pp_lightning.tables import Grid

_COLUMNS = {
    "variant": "variant",
    "part": "part",
    "milliseconds": "ms, median (min-max)",
    "flops_ratio": "FLOPs ratio",
    "time_ratio": "time ratio",
    "efficiency": "efficiency",
    "tokens_per_second": "tokens/s",
    "changed": "units changed",
    "compile_seconds": "compile s (graphs)",
    "peak_megabytes": "peak MB",
    "perplexity": "perplexity",
    "prr": "PRR",
}


@dataclass(frozen=True)
class Row:
    """What was measured.

    Attributes:
        variant: how the model ran.
        part: ``decoder`` (all layers), ``model`` (with the projection to the vocabulary), ``attention block``,
            ``MLP block``, ``prompt`` (in front of what is decoded) or ``decoding`` (one token).
        dtype, rows, tokens, pruning_ratio: the case.
        median, fastest, slowest: milliseconds; of one token in decoding.
        flops_ratio: FLOPs over dense FLOPs of this part, probes included.
        time_ratio: median over rounds of the time over the dense time of the same round; dense is compiled where the
            variant is.
        changed: mean share of the kept units that the batch before had not kept.
        compile_seconds: time spent compiling before the timed rounds.
        graphs: compiled graphs, recompilations included.
        peak_megabytes: resident memory on a CPU, allocated memory on an accelerator.
        prr: perplexity lost per millisecond saved.
    """

    variant: str
    part: str
    dtype: str
    rows: int
    tokens: int
    pruning_ratio: float
    median: float
    fastest: float
    slowest: float
    rounds: int
    flops_ratio: float
    time_ratio: float
    tokens_per_second: float
    changed: float | None = None
    compile_seconds: float | None = None
    graphs: int | None = None
    peak_megabytes: float | None = None
    perplexity: float | None = None
    prr: float | None = None

    @classmethod
    def timed(cls, seconds: Sequence[float], reference: Sequence[float], *, tokens_a_round: int, **about: Any) -> "Row":
        """A row from the seconds of each round and the dense seconds of the same rounds; ``about`` is all the rest."""
        median = statistics.median(seconds)
        return cls(
            median=1000 * median,
            fastest=1000 * min(seconds),
            slowest=1000 * max(seconds),
            rounds=len(seconds),
            time_ratio=paired_ratio(seconds, reference),
            tokens_per_second=tokens_a_round / median,
            **about,
        )

    @property
    def case(self) -> str:
        """What was run, in words."""
        return f"{self.dtype}, batch {self.rows} x {self.tokens}, ratio {self.pruning_ratio:g}"

    @property
    def efficiency(self) -> float:
        """FLOPs ratio over time ratio: 1 means that every saved operation became saved time."""
        return self.flops_ratio / self.time_ratio

    def as_dict(self) -> dict[str, object]:
        """Plain types."""
        return {**asdict(self), "efficiency": self.efficiency}


def paired_ratio(seconds: Sequence[float], reference: Sequence[float]) -> float:
    """Median of the ratios round by round: a machine that drifts moves both alike."""
    return statistics.median(own / other for own, other in zip(seconds, reference, strict=True))


def grids(rows: Sequence[Row]) -> list[Grid]:
    """One table per case, and one of efficiencies over all cases above them."""
    cases = dict.fromkeys(row.case for row in rows)
    return [_overview(rows), *(_table(case, [row for row in rows if row.case == case]) for case in cases)]


def _overview(rows: Sequence[Row]) -> Grid:
    """Efficiency of the decoder: variants down, cases across."""
    own = [row for row in rows if row.part == "decoder" and not row.variant.startswith("dense")]
    cases = list(dict.fromkeys(row.case for row in own))
    found = {(row.variant, row.case): f"{row.efficiency:.2f}" for row in own}
    variants = dict.fromkeys(row.variant for row in own)
    lines = [(variant, *(found.get((variant, case), "") for case in cases)) for variant in variants]
    return Grid("", ("efficiency of the decoder", *cases), lines)


def _table(case: str, rows: Sequence[Row]) -> Grid:
    cells = [_cells(row) for row in rows]
    used = [name for name in _COLUMNS if any(one[name] for one in cells)]
    return Grid(case, [_COLUMNS[name] for name in used], [[one[name] for name in used] for one in cells], words=2)


def _cells(row: Row) -> dict[str, str]:
    compiled = row.compile_seconds is not None
    return {
        "variant": row.variant,
        "part": row.part,
        "milliseconds": f"{row.median:.1f} ({row.fastest:.1f}-{row.slowest:.1f})",
        "flops_ratio": f"{row.flops_ratio:.3f}",
        "time_ratio": f"{row.time_ratio:.3f}",
        "efficiency": f"{row.efficiency:.2f}",
        "tokens_per_second": f"{row.tokens_per_second:.0f}",
        "changed": "" if row.changed is None else f"{row.changed:.1%}",
        "compile_seconds": f"{row.compile_seconds:.0f} ({row.graphs})" if compiled else "",
        "peak_megabytes": "" if row.peak_megabytes is None else f"{row.peak_megabytes:.0f}",
        "perplexity": "" if row.perplexity is None else f"{row.perplexity:.2f}",
        "prr": "" if row.prr is None else f"{row.prr:.4f}",
    }
