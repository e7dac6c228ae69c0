"""The questions that ``pp-lightning ablate`` knows: the paper's, and those of what goes beyond it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from pp_lightning.methods import (
    FLAP,
    AfterOCP,
    FullBatchProbing,
    Griffin,
    ProbePruning,
    PruningMethod,
    StaticPPsp,
    WandaSP,
)
from pp_lightning.methods.base import AllocationName


@dataclass(frozen=True)
class Variant:
    """One answer that is tried.

    Attributes:
        label: what is different about it.
        method: from the seed of the run.
        x: its place on the question's axis, where that is a number.
        line: what it shares a line with in the picture.
        allocation: overrules the method's own.
        skip_layers: overrules the module's own.
        refresh: the same.
        data: settings of the data that it is measured on, the dense model too: ``prefix``, ``batch_size``.
    """

    label: str
    method: Callable[[int], PruningMethod]
    x: float | None = None
    line: str = ""
    allocation: AllocationName | None = None
    skip_layers: tuple[int, ...] | None = None
    refresh: int | None = None
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """Variants that differ in one thing.

    Attributes:
        title: the question.
        variants: the answers. The first is the one that the others are compared with.
        axis: what ``x`` is; None where variants have names only.
        overlap: also compare each layer's kept units with those of Full-Batch Probing.
        continues: whether it is about what follows a prompt: for protocol ``continuation`` only.
    """

    title: str
    variants: Sequence[Variant]
    axis: str | None = None
    overlap: bool = False
    continues: bool = False


def _changed(base: Callable[[], ProbePruning], **changes: Any) -> Callable[[int], PruningMethod]:
    """``base`` with other settings, and with the seed of the run."""
    return lambda seed: ProbePruning(**{**base().settings(), "seed": seed, **changes})


def _paper(label: str, x: float | None = None, **changes: Any) -> Variant:
    return Variant(label, _changed(ProbePruning.paper, **changes), x)


def _best(label: str, x: float | None = None, **changes: Any) -> Variant:
    return Variant(label, _changed(ProbePruning.best, **changes), x)


def _full_batch(allocation: AllocationName | None = None) -> Variant:
    name = "Full-Batch Probing" if allocation is None else f"Full-Batch Probing, {allocation} ratios"
    return Variant(name, lambda seed: FullBatchProbing(), allocation=allocation)


def _sized(variant: Callable[..., Variant], rows: float, tokens: float, x: float) -> Variant:
    return variant(f"{rows:.0%} rows x {tokens:.0%} tokens", x, row_ratio=rows, token_ratio=tokens)


def _generating(label: str, x: float | None = None, **changes: Any) -> Variant:
    return Variant(label, _changed(partial(ProbePruning.best, generation=True), **changes), x)


def _each(
    variants: Sequence[Variant], values: Sequence[int], told: Callable[[int], str], **data: Callable[[int], Any]
) -> list[Variant]:
    """Every variant with every value of a setting of the data."""
    return [
        replace(
            one,
            label=f"{one.label}, {told(value)}",
            line=one.label,
            x=value,
            data={name: of(value) for name, of in data.items()},
        )
        for one in variants
        for value in values
    ]


_STATIC = (
    Variant("static PPsp", lambda seed: StaticPPsp()),
    Variant("Wanda-sp", lambda seed: WandaSP()),
    Variant("FLAP", lambda seed: FLAP()),
)
_SIZES = ((0.05, 0.05), (0.05, 0.1), (0.05, 0.25), (0.05, 0.5), (0.1, 0.5), (0.25, 0.5), (0.5, 0.5), (1.0, 1.0))
_SHAPES = ((0.05, 0.5), (0.1, 0.25), (0.25, 0.1), (0.5, 0.05))
_UNTIL = {0: 16, 16: 32, 32: 64, 64: 96, 96: 128}  # where a stretch behind the prompt ends
_WEIGHTS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
_BEST_WEIGHT = ProbePruning.best().fusion_weight

QUESTIONS: Mapping[str, Question] = {
    "methods": Question(
        "What do the published method, its upper bound and our best settings reach?",
        [
            _paper("PP as published"),
            _full_batch(),
            Variant("static PPsp", lambda seed: StaticPPsp()),
            _best("PP, best (ours)"),
        ],
    ),
    "probe_size": Question(
        "How large must the probe be?",
        [_paper("5% rows x 50% tokens", 0.025)]
        + [_sized(_paper, rows, tokens, rows * tokens) for rows, tokens in _SIZES if (rows, tokens) != (0.05, 0.5)],
        axis="probe, as a fraction of the batch's tokens",
    ),
    "probe_shape": Question(
        "Many rows or many tokens, at the same cost?",
        [_sized(_paper, rows, tokens, rows) for rows, tokens in _SHAPES],
        axis="fraction of rows (rows x tokens is always 2.5%)",
    ),
    "fusion": Question(
        "How much does the probe count against the history?",
        [_paper("by importance (as published)")] + [_paper(f"{w:g}", fusion_weight=w) for w in _WEIGHTS],
    ),
    "history": Question(
        "Does the history have to move?",
        [_paper("momentum 0.99 (as published)")]
        + [_paper(f"momentum {m:g}", momentum=m) for m in (0.9, 0.999)]
        + [_paper("fixed history", momentum=1.0), _paper("no history", fusion_weight=1.0)],
    ),
    "ranking": Question(
        "Which rows and tokens make the best probe?",
        [_paper("residual (as published)")]
        + [_paper(rank, rank_by=rank) for rank in ("input", "random", "stratified")]
        + [_best(f"best, {rank}", rank_by=rank) for rank in ("residual", "input", "random", "stratified")],
    ),
    "residual": Question(
        "What does a probe of an earlier residual cost in quality?",
        [
            _paper("current residual"),
            _paper("previous residual", probe_source="previous"),
            _best("best, current residual"),
            _best("best, previous residual", probe_source="previous"),
        ],
    ),
    "score": Question(
        "What should a unit be scored by?",
        [_paper("ppsp (as published)"), _paper("energy", score="energy")]
        + [_best(f"best, {score}", score=score) for score in ("ppsp", "energy", "centered")],
    ),
    "compensation": Question(
        "Is it worth putting back what pruned channels contribute on average?",
        [_paper("none (as published)")]
        + [_paper(f"mean of the {source}", compensation=source) for source in ("probe", "history")]
        + [
            _best("best, none", compensation=None, score="energy"),
            _best("best, mean of the history", compensation="history"),
            _best("best, mean of the probe"),
        ],
    ),
    "allocation": Question(
        "Where should the units go?",
        [
            _best("best, uniform, three layers skipped", allocation="uniform"),
            Variant("best, uniform, none skipped", _changed(ProbePruning.best), allocation="uniform", skip_layers=()),
            _best("best, global"),
            _paper("PP as published"),
            _paper("PP as published, global", allocation="global"),
            _full_batch(),
            _full_batch("global"),
        ],
    ),
    "mlp_probe": Question(
        "Should the MLP's probe be rows x tokens, or single tokens from anywhere?",
        [_best("rows x tokens"), _best("single tokens", scattered_mlp=True)],
    ),
    "weight": Question(
        "How much should the probe of the best settings count against the history?",
        [_best(f"{_BEST_WEIGHT:g} (best)", _BEST_WEIGHT)]
        + [_best(f"{w:g}", w, fusion_weight=w) for w in _WEIGHTS if w != _BEST_WEIGHT],
        axis="weight of the probe",
    ),
    "best_size": Question(
        "How large must the probe of the best settings be?",
        [_best("10% rows x 25% tokens", 0.025)]
        + [_sized(_best, rows, tokens, rows * tokens) for rows, tokens in ((0.05, 0.1), (0.05, 0.25))]
        + [_sized(_best, rows, tokens, rows * tokens) for rows, tokens in ((0.1, 0.5), (0.25, 0.5), (1.0, 1.0))],
        axis="probe, as a fraction of the batch's tokens",
    ),
    "overlap": Question(
        "Do the kept units agree with what the whole batch would keep?",
        [
            _paper("PP as published"),
            _paper("history only", fusion_weight=0.0),
            _paper("probe only", fusion_weight=1.0),
            _paper("random probe", rank_by="random"),
            _best("best, uniform ratios", allocation="uniform"),
        ],
        overlap=True,
    ),
    "generation": Question(
        "What follows a prompt that chose alone: which method loses least?",
        [
            _paper("PP as published"),
            _full_batch(),
            _best("PP, best (ours)"),
            _generating("best for generation (ours)"),
            Variant("after OCP", lambda seed: AfterOCP()),
            Variant("GRIFFIN (MLPs)", lambda seed: Griffin()),
            *_STATIC,
        ],
        continues=True,
    ),
    "prompt": Question(
        "Should the prompt run pruned, or dense?",
        [
            _paper("PP as published"),
            _paper("PP, dense prompt", prefill="dense"),
            _best("best"),
            _best("best, dense prompt", prefill="dense"),
            _generating("best for generation"),
            _generating("best for generation, no mean put back", compensation=None, score="energy"),
        ],
        continues=True,
    ),
    "prompt_weight": Question(
        "How much should a dense prompt count against the history?",
        [_generating("0.6 (best for generation)", 0.6)]
        + [_generating(f"{w:g}", w, fusion_weight=w) for w in (0.1, 0.3, 0.5, 0.75, 1.0)],
        axis="weight of the prompt",
        continues=True,
    ),
    "prefix": Question(
        "How long must a prompt be?",
        _each(
            [_generating("best for generation"), _paper("PP as published"), _STATIC[-1]],
            (128, 16, 32, 64, 256, 512),
            "{} tokens".format,
            prefix=int,
        ),
        axis="tokens of the prompt",
        continues=True,
    ),
    "rows": Question(
        "What does one choice for all rows of a batch cost?",
        _each(
            [_generating("best for generation"), _paper("PP as published")],
            (20, 5, 2, 1),
            lambda rows: "1 row" if rows == 1 else f"{rows} rows",
            batch_size=int,
        ),
        axis="rows of a batch",
        continues=True,
    ),
    "distance": Question(
        "How fast does a choice age?",
        _each(
            [_generating("best for generation"), _paper("PP as published"), _STATIC[-1]],
            (0, 16, 32, 64, 96),
            lambda start: f"{start} to {_UNTIL[start]} tokens behind the prompt",
            distances=lambda start: (start, _UNTIL[start]),
        ),
        axis="tokens behind the prompt",
        continues=True,
    ),
    "refresh": Question(
        "Is it worth choosing channels again while decoding?",
        [
            _generating("held"),
            *(replace(_generating(f"every {n} tokens"), refresh=n) for n in (16, 32, 64)),
        ],
        continues=True,
    ),
}
