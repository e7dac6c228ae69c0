"""What an evaluation leaves behind, for people: tables and a picture."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from pp_lightning.app.results import Comparison, Evaluation
from pp_lightning.export.costs import in_words

NAMES = {
    "dense": "Dense",
    "full_batch": "Full-Batch Probing",
    "pp": "Probe Pruning",
    "best": "Probe Pruning, best (ours)",
    "best_generation": "best for generation (ours)",
    "griffin": "GRIFFIN (MLPs)",
    "after_ocp": "after OCP",
    "ppsp": "static PPsp",
    "flap": "FLAP",
    "wanda_sp": "Wanda-sp",
    "llm_pruner": "LLM-Pruner",
    "lora_prune": "LoRAPrune",
    "static_best": "static best (ours)",
    "ppsp_updated": "static PPsp, updated",
    "flap_updated": "FLAP, updated",
    "wanda_sp_updated": "Wanda-sp, updated",
    "llm_pruner_updated": "LLM-Pruner, updated",
    "ppsp_lora": "static PPsp, LoRA",
    "flap_lora": "FLAP, LoRA",
    "wanda_sp_lora": "Wanda-sp, LoRA",
    "llm_pruner_lora": "LLM-Pruner, LoRA",
    "lora_prune_lora": "LoRAPrune, LoRA",
}

_FAR_APART = 4.0  # perplexities that many times the lowest one
HEADINGS = (
    "method",
    "ratio",
    "perplexity",
    "above dense",
    "FLOPs ratio",
    "after the prompt",
    "time ratio",
    "efficiency",
    "PRR",
    "ms/batch",
    "heads kept",
    "channels kept",
)
_OPTIONAL = (HEADINGS.index("after the prompt"),)
ACCURACIES = {"acc": "accuracy", "acc_norm": "accuracy, per character", "acc_token": "accuracy, per token"}


@dataclass(frozen=True)
class Grid:
    """A table as text.

    Attributes:
        title: what the numbers are, empty where the headings say it.
        headings: of the columns.
        rows: cells.
    """

    title: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]


def grids(rows: Sequence[Comparison]) -> list[Grid]:
    """The tables of a run: one for a text; for tasks one an accuracy, with a row a task and a column a model."""
    if rows[0].evaluation.tasks is None:
        return [_text_grid(rows)]
    evaluations = [row.evaluation for row in rows]
    return [_task_grid(evaluations, key, title) for key, title in ACCURACIES.items()]


def show(grids: Sequence[Grid], caption: str) -> None:
    """Print the tables to the terminal, whole even where it is narrow: cut numbers are worse than wrapped lines."""
    for grid in grids:
        show_grid(grid)
    Console().print(caption, highlight=False)


def show_grid(grid: Grid) -> None:
    """Print one table, as wide as it needs."""
    table = Table(title=grid.title or None, title_justify="left")
    for index, heading in enumerate(grid.headings):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=True)
    for cells in grid.rows:
        table.add_row(*cells)
    widest = Console(width=1000)
    needed = Measurement.get(widest, widest.options, table).maximum
    Console(width=max(Console().width, needed)).print(table)


def markdown(grids: Sequence[Grid], caption: str) -> str:
    """The tables in Markdown, with their caption below."""
    lines: list[str] = []
    for grid in grids:
        lines += [f"**{grid.title}**", ""] if grid.title else []
        lines += ["| " + " | ".join(grid.headings) + " |", "|---" + "|---:" * (len(grid.headings) - 1) + "|"]
        lines += ["| " + " | ".join(cells) + " |" for cells in grid.rows] + [""]
    return "\n".join([*lines, caption, ""])


def comma_separated(rows: Sequence[Comparison]) -> str:
    """All figures unrounded, one row a line."""
    flat = [line for row in rows for line in _flat(row)]
    text = io.StringIO()
    fields = dict.fromkeys(field for line in flat for field in line)  # the dense row has no kept counts
    writer = csv.DictWriter(text, fieldnames=list(fields))
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def plot(rows: Sequence[Comparison], caption: str, path: Path) -> None:
    """Quality over FLOPs, one line a method, as PNG: perplexity of a text, or mean accuracy of tasks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and only needed here
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    dense = rows[0].evaluation
    for label in dict.fromkeys(row.evaluation.method for row in rows[1:]):
        points = [_point(dense)] + [_point(row.evaluation) for row in rows if row.evaluation.method == label]
        x, y = zip(*sorted(points, reverse=True), strict=True)
        axes.plot(x, y, marker="o", label=NAMES.get(label, label))
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
    figure.supxlabel(caption, fontsize=6)
    FigureCanvasAgg(figure)
    figure.savefig(path)


def perplexity_axis(axes: Any, lowest: float, highest: float) -> None:
    """Set up the y axis for perplexities: logarithmic where they are far apart, with plain numbers at its ticks.

    Args:
        axes: of matplotlib.
        lowest: perplexity on it.
        highest: perplexity on it.
    """
    axes.set_ylabel("perplexity")
    if highest > _FAR_APART * lowest:
        axes.set_yscale("log")
        plain_ticks(axes.yaxis, (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))


def plain_ticks(axis: Any, steps: Sequence[float]) -> None:
    """Numbers as people write them on a logarithmic axis of matplotlib, at these multiples of the powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))  # 40, not 4 x 10^1
    axis.set_minor_formatter(NullFormatter())


def _point(evaluation: Evaluation) -> tuple[float, float]:
    if evaluation.tasks is not None:
        return evaluation.flops.model, 100 * evaluation.tasks["mean"]["acc"]
    assert evaluation.perplexity is not None
    return evaluation.flops.model, evaluation.perplexity


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _text_grid(rows: Sequence[Comparison]) -> Grid:
    """The table of a text; what no row has is left out."""
    cells = [_text_cells(row) for row in rows]
    used = [index for index in range(len(HEADINGS)) if index not in _OPTIONAL or any(one[index] for one in cells)]
    return Grid("", tuple(HEADINGS[i] for i in used), [tuple(one[i] for i in used) for one in cells])


def _text_cells(row: Comparison) -> tuple[str, ...]:
    e = row.evaluation
    assert e.perplexity is not None
    return (
        NAMES.get(e.method, e.method),
        f"{e.pruning_ratio:.0%}",
        f"{e.perplexity:.2f}" + ("" if e.perplexity_error is None else f" ±{e.perplexity_error:.2f}"),
        _number(row.degradation, "+.2f"),
        f"{e.flops.model:.3f}",
        "" if e.flops.after_prompt is None else f"{e.flops.after_prompt:.3f}",
        _number(row.time_ratio, ".3f"),
        _number(row.efficiency, ".2f"),
        _number(row.prr, ".3g"),
        "-" if e.time is None else f"{e.time.median:.1f} ({e.time.fastest:.1f}-{e.time.slowest:.1f})",
        _range(e.kept.get("attention")),
        _range(e.kept.get("mlp")),
    )


def _task_grid(evaluations: Sequence[Evaluation], key: str, title: str) -> Grid:
    results = [evaluation.tasks for evaluation in evaluations if evaluation.tasks is not None]
    labels = [f"{NAMES.get(e.method, e.method)} {e.pruning_ratio:.0%}" for e in evaluations]
    rows = []
    for task, first in results[0]["tasks"].items():
        accuracies = [_accuracy(result["tasks"][task], key) for result in results]
        rows.append((task, str(first["questions"]), str(first["cut_rows"]), *accuracies))
    total = sum(task["questions"] for task in results[0]["tasks"].values())
    means = [_accuracy(result["mean"], key) for result in results]
    rows.append(("mean", str(total), str(results[0]["cut_rows"]), *means))
    rows.append(("FLOPs ratio", "", "", *(f"{e.flops.model:.3f}" for e in evaluations)))
    return Grid(title, ("task", "questions", "contexts cut", *labels), rows)


def _accuracy(result: Mapping[str, Any], key: str) -> str:
    error = result[f"{key}_stderr"]
    return f"{100 * result[key]:.1f}" + ("" if error is None else f" ±{100 * error:.1f}")


def _range(counts: tuple[int, int] | None) -> str:
    return "all" if counts is None else in_words(counts)


def _flat(row: Comparison) -> list[dict[str, object]]:
    """Lines of the CSV: one for a text, one a task and one for the mean."""
    flat: dict[str, object] = {}
    for key, value in row.as_dict().items():
        if key == "time":
            flat |= {f"ms_{name}": number for name, number in value.items()}
        elif key == "kept":
            for block, (low, high) in value.items():
                flat |= {f"{block}_kept_min": low, f"{block}_kept_max": high}
        elif key == "perplexities":
            flat |= {f"perplexity_{number}": one for number, one in enumerate(value or ())}
        elif key not in ("settings", "tasks"):
            flat[key] = value
    tasks = row.evaluation.tasks
    if tasks is None:
        return [flat]
    return [{**flat, "task": name, **result} for name, result in [*tasks["tasks"].items(), ("mean", tasks["mean"])]]
