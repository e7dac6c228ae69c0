"""What an evaluation leaves behind, for people: tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from pp_lightning.app.results import Comparison, Evaluation
from pp_lightning.export.costs import in_words
from pp_lightning.tables import Grid

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
}

HEADINGS = (
    "method",
    "ratio",
    "perplexity",
    "above dense",
    "above the first",
    "FLOPs ratio",
    "after the prompt",
    "time ratio",
    "efficiency",
    "PRR",
    "ms/batch",
    "heads kept",
    "channels kept",
)
_OPTIONAL = (HEADINGS.index("above the first"), HEADINGS.index("after the prompt"))
ACCURACIES = {"acc": "accuracy", "acc_norm": "accuracy, per character", "acc_token": "accuracy, per token"}


def name_of(label: str) -> str:
    """The name of a row in tables and pictures."""
    for end, told in (("_updated", ", updated"), ("_lora", ", LoRA")):
        if label.endswith(end):
            return name_of(label.removesuffix(end)) + told
    return NAMES.get(label, label)


def grids(rows: Sequence[Comparison]) -> list[Grid]:
    """The tables of a run: one for a text; for tasks one an accuracy, with a row a task and a column a model."""
    evaluations = [row.evaluation for row in rows]
    if evaluations[0].tasks is None:
        compared = [one for one in evaluations if one.overlap is not None]
        return [_text_grid(rows)] + ([_overlap_grid(compared)] if compared else [])
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
        table.add_column(heading, justify="left" if index < grid.words else "right", no_wrap=True)
    for cells in grid.rows:
        table.add_row(*cells)
    widest = Console(width=1000)
    needed = Measurement.get(widest, widest.options, table).maximum
    Console(width=max(Console().width, needed)).print(table)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _error(error: float | None) -> str:
    return "" if error is None else f" ±{error:.2f}"


def _text_grid(rows: Sequence[Comparison]) -> Grid:
    """The table of a text; what no row has is left out."""
    cells = [_text_cells(row) for row in rows]
    used = [index for index in range(len(HEADINGS)) if index not in _OPTIONAL or any(one[index] for one in cells)]
    return Grid("", tuple(HEADINGS[i] for i in used), [tuple(one[i] for i in used) for one in cells])


def _text_cells(row: Comparison) -> tuple[str, ...]:
    e = row.evaluation
    assert e.perplexity is not None
    return (
        name_of(e.method),
        f"{e.pruning_ratio:.0%}",
        f"{e.perplexity:.2f}{_error(e.perplexity_error)}",
        _number(row.degradation, "+.2f"),
        "" if row.difference is None else f"{row.difference:+.2f}{_error(row.difference_error)}",
        f"{e.flops.model:.3f}",
        "" if e.flops.after_prompt is None else f"{e.flops.after_prompt:.3f}",
        _number(row.time_ratio, ".3f"),
        _number(row.efficiency, ".2f"),
        _number(row.prr, ".3g"),
        "-" if e.time is None else f"{e.time.median:.1f} ({e.time.fastest:.1f}-{e.time.slowest:.1f})",
        _range(e.kept.get("attention")),
        _range(e.kept.get("mlp")),
    )


def _overlap_grid(evaluations: Sequence[Evaluation]) -> Grid:
    """Jaccard indices by layer and block, a column a row of the comparison."""
    shares = [e.overlap or {} for e in evaluations]
    columns = [f"{name_of(e.method)} {e.pruning_ratio:.0%}" for e in evaluations]
    rows = [(name, *(f"{one[name]:.2f}" for one in shares)) for name in shares[0]]
    return Grid("Units shared with Full-Batch Probing, intersection over union", ("layer.block", *columns), rows)


def _task_grid(evaluations: Sequence[Evaluation], key: str, title: str) -> Grid:
    results = [evaluation.tasks for evaluation in evaluations if evaluation.tasks is not None]
    labels = [f"{name_of(e.method)} {e.pruning_ratio:.0%}" for e in evaluations]
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


def lines_of(row: Comparison) -> list[dict[str, object]]:
    """Lines for a CSV: one for a text, one a task and one for the mean."""
    flat: dict[str, object] = {}
    for key, value in row.as_dict().items():
        if key == "time":
            flat |= {f"ms_{name}": number for name, number in value.items()}
        elif key == "kept":
            for block, (low, high) in value.items():
                flat |= {f"{block}_kept_min": low, f"{block}_kept_max": high}
        elif key == "perplexities":
            flat |= {f"perplexity_{number}": one for number, one in enumerate(value or ())}
        elif key == "overlap":
            flat |= {f"overlap_{name}": share for name, share in value.items()}
        elif key not in ("settings", "tasks"):
            flat[key] = value
    tasks = row.evaluation.tasks
    if tasks is None:
        return [flat]
    return [{**flat, "task": name, **result} for name, result in [*tasks["tasks"].items(), ("mean", tasks["mean"])]]
