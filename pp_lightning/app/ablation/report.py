"""Tables and plots of an ablation, one of each a question."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pp_lightning.app.ablation.answers import Answer
from pp_lightning.app.ablation.questions import Question
from pp_lightning.app.report import Grid, perplexity_axis, plain_ticks

_WIDE = 20.0  # places on a question's axis this many times the smallest: a probe of everything, and of 0.25%
HEADINGS = ("variant", "ratio", "perplexity", "times dense", "difference", "degradation", "FLOPs ratio")


def grid(question: Question, answers: Sequence[Answer]) -> Grid:
    """A question's table. The difference is from its first row, paired by seed; so is the degradation above dense."""
    dense = "dense " + ", ".join(dict.fromkeys(f"{answer.dense:.2f}" for answer in answers))
    rows: list[tuple[str, ...]] = [
        (
            answer.variant,
            f"{answer.ratio:.0%}",
            str(answer.perplexity),
            f"{answer.perplexity.value / answer.dense:.3f}",
            ""
            if answer.variant == question.variants[0].label or answer.dense != answers[0].dense
            else f"{answer.difference.value:+.2f}"
            + ("" if answer.difference.error is None else f" ±{answer.difference.error:.2f}"),
            "" if answer.degradation is None else f"{answer.degradation:.2f}x",
            f"{answer.flops_ratio:.3f}",
        )
        for answer in answers
    ]
    return Grid(f"{question.title} ({dense})", HEADINGS, rows)


def overlap_grid(answers: Sequence[Answer]) -> Grid:
    """Jaccard indices by layer and block, a column a variant."""
    names = list(answers[0].overlap or ())
    rows = [(name, *(f"{(a.overlap or {})[name]:.2f}" for a in answers)) for name in names]
    columns = [f"{a.variant} {a.ratio:.0%}" for a in answers]
    return Grid("Units shared with Full-Batch Probing, intersection over union", ("layer.block", *columns), rows)


def tables(questions: dict[str, Question], answers: Sequence[Answer]) -> list[Grid]:
    """All tables of a run."""
    grids = []
    for name, question in questions.items():
        own = [answer for answer in answers if answer.question == name]
        grids += [grid(question, own)] + ([overlap_grid(own)] if question.overlap else [])
    return grids


def comma_separated(answers: Sequence[Answer]) -> str:
    """Every single measurement, unrounded: one row a variant, ratio and seed."""
    text = io.StringIO()
    fields = ("question", "variant", "x", "ratio", "seed", "perplexity", "dense", "tokens", "flops_ratio")
    writer = csv.DictWriter(text, fieldnames=fields)
    writer.writeheader()
    for answer in answers:
        shared = {name: getattr(answer, name) for name in fields if name not in ("seed", "perplexity")}
        for seed, perplexity in zip(answer.seeds, answer.perplexities, strict=True):
            writer.writerow({**shared, "seed": seed, "perplexity": perplexity})
    return text.getvalue()


def plot(question: Question, answers: Sequence[Answer], caption: str, path: Path) -> None:
    """A question's picture: perplexity with its standard error over the axis, or over the names, a line a ratio."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and only needed here
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot(2, 1, 1) if question.overlap else figure.add_subplot()
    relative = len({answer.dense for answer in answers}) > 1  # other tokens are scored, so that dense differs too
    for line, ratio in dict.fromkeys((answer.line, answer.ratio) for answer in answers):
        own = [answer for answer in answers if (answer.line, answer.ratio) == (line, ratio)]
        if question.axis is not None:
            own = sorted(own, key=lambda answer: answer.x or 0.0)
        places: list[Any] = [answer.variant if question.axis is None else answer.x for answer in own]
        units = [a.dense if relative else 1.0 for a in own]
        values = [a.perplexity.value / unit for a, unit in zip(own, units, strict=True)]
        errors = [(a.perplexity.error or 0.0) / unit for a, unit in zip(own, units, strict=True)]
        style, name = "none" if question.axis is None else "-", f"{line}, " if line else ""
        told = f"{name}{ratio:.0%} removed"
        axes.errorbar(places, values, errors, marker="o", capsize=3, linestyle=style, label=told)
    dense = 1.0 if relative else answers[0].dense
    axes.axhline(dense, color="black", linewidth=0.8, linestyle=":", label="dense")
    axes.set(
        title=question.title,
    )
    perplexity_axis(axes, dense, max(a.perplexity.value / (a.dense if relative else 1.0) for a in answers))
    if relative:
        axes.set_ylabel("perplexity, times the dense model's on the same tokens")
    if question.axis is None:
        axes.tick_params(axis="x", labelrotation=20, labelsize=7)
    else:
        axes.set_xlabel(question.axis)
        places = [answer.x or 0.0 for answer in answers]
        if max(places) > _WIDE * min(places) > 0.0:
            axes.set_xscale("log")
            plain_ticks(axes.xaxis, (1.0, 2.0, 5.0))
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    if question.overlap:
        lower = figure.add_subplot(2, 1, 2)
        for answer in answers:
            overlap = answer.overlap or {}
            lower.plot(list(overlap), list(overlap.values()), marker=".", label=f"{answer.variant} {answer.ratio:.0%}")
        lower.set(ylabel="shared with Full-Batch Probing", ylim=(0, 1))
        lower.tick_params(axis="x", labelrotation=90, labelsize=6)
        lower.legend(fontsize=6)
    figure.supxlabel(caption, fontsize=6)
    FigureCanvasAgg(figure)
    figure.savefig(path)
