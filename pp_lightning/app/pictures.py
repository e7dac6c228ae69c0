"""Pictures of results, as PNG."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pp_lightning.app.report import name_of
from pp_lightning.app.results import Comparison, Evaluation
from pp_lightning.records import write_text
from pp_lightning.tables import comma_separated

_FAR_APART = 4.0  # perplexities that many times the lowest one


@contextmanager
def picture(path: Path, width: float, height: float, caption: str = "") -> Iterator[Any]:
    """A figure of matplotlib, written when all is drawn.

    Sizes are inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and only needed here
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    figure.supxlabel(caption, fontsize=6, wrap=True)
    figure.savefig(path)


def plot(rows: Sequence[Comparison], caption: str, path: Path) -> None:
    """Quality over FLOPs, one line a method: perplexity of a text, or mean accuracy of tasks."""
    dense = rows[0].evaluation
    with picture(path, 7.5, 5, caption) as figure:
        axes = figure.add_subplot()
        for label in dict.fromkeys(row.evaluation.method for row in rows[1:]):
            points = [_point(dense)] + [_point(row.evaluation) for row in rows if row.evaluation.method == label]
            x, y = zip(*sorted(points, reverse=True), strict=True)
            axes.plot(x, y, marker="o", label=name_of(label))
        axes.plot(*_point(dense), marker="*", markersize=14, color="black", linestyle="none")
        axes.annotate("dense", _point(dense), xytext=(-8, 10), textcoords="offset points", ha="right")
        axes.invert_xaxis()
        axes.set_xlabel("FLOPs relative to dense (probe included)")
        if dense.tasks is None:
            perplexity_axis(axes, *(choose(_point(row.evaluation)[1] for row in rows) for choose in (min, max)))
        else:
            axes.set(ylabel="mean accuracy of the tasks, %")
        axes.grid(alpha=0.3, which="both")
        if len(rows) > 1:
            axes.legend()


def plot_study(rows: Sequence[Comparison], caption: str, path: Path) -> None:
    """Perplexity relative to the dense model's, with its standard error, over the names of the rows."""
    pruned = [row for row in rows if row.evaluation.pruning_ratio > 0.0]
    with picture(path, 7.5, 5, caption) as figure:
        axes = figure.add_subplot()
        highest = 1.0
        for ratio in dict.fromkeys(row.evaluation.pruning_ratio for row in pruned):
            own = [row for row in pruned if row.evaluation.pruning_ratio == ratio]
            found = [(row.evaluation.perplexity or 0.0, row.degradation or 0.0, row.evaluation) for row in own]
            values = [perplexity / (perplexity - lost) for perplexity, lost, _ in found]
            errors = [(e.perplexity_error or 0.0) / (perplexity - lost) for perplexity, lost, e in found]
            names = [name_of(e.method) for *_, e in found]
            axes.errorbar(names, values, errors, marker="o", capsize=3, linestyle="none", label=f"{ratio:.0%} removed")
            highest = max(highest, *values)
        axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":", label="dense")
        perplexity_axis(axes, 1.0, highest)
        axes.set_ylabel("perplexity, times the dense model's on the same tokens")
        axes.tick_params(axis="x", labelrotation=20, labelsize=7)
        axes.grid(alpha=0.3, which="both")
        axes.legend()


def write_curve(losses: Sequence[float], pruned: Sequence[float], folder: Path) -> None:
    """Write ``training.csv`` and ``training.png``.

    ``losses`` and ``pruned``, the share of the ratio that was reached, are one number an optimiser step.
    """
    steps = range(1, len(losses) + 1)
    figures = zip(steps, losses, pruned, strict=True)
    lines = [dict(zip(("step", "loss", "pruned"), line, strict=True)) for line in figures]
    write_text(folder / "training.csv", comma_separated(lines))
    with picture(folder / "training.png", 7.5, 4) as figure:
        axes = figure.add_subplot(xlabel="optimiser step", ylabel="training loss")
        axes.plot(steps, losses, linewidth=1)
        axes.grid(alpha=0.3)
        if len(set(pruned)) > 1:
            other = axes.twinx()
            other.plot(steps, pruned, color="black", linestyle=":", linewidth=1)
            other.set(ylabel="share of the ratio removed (dotted)", ylim=(0, 1.05))


def perplexity_axis(axes: Any, lowest: float, highest: float) -> None:
    """Set up the y axis for perplexities: logarithmic where they are far apart, with plain numbers at its ticks."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_ylabel("perplexity")
    if highest > _FAR_APART * lowest:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))  # 40, not 4 x 10^1
        axes.yaxis.set_minor_formatter(NullFormatter())


def _point(evaluation: Evaluation) -> tuple[float, float]:
    if evaluation.tasks is not None:
        return evaluation.flops.model, 100 * evaluation.tasks["mean"]["acc"]
    assert evaluation.perplexity is not None
    return evaluation.flops.model, evaluation.perplexity
