"""What an evaluation leaves behind, for people: tables and a picture."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pp_lightning.app.results import Comparison

NAMES = {
    "dense": "Dense",
    "full_batch": "Full-Batch Probing",
    "pp": "Probe Pruning",
    "ppsp": "static PPsp",
    "flap": "FLAP",
    "wanda_sp": "Wanda-sp",
}

HEADINGS = (
    "method",
    "ratio",
    "perplexity",
    "above dense",
    "FLOPs ratio",
    "time ratio",
    "efficiency",
    "PRR",
    "ms/batch",
    "heads kept",
    "channels kept",
)


def cells(row: Comparison) -> tuple[str, ...]:
    """One row of the table, in the order of ``HEADINGS``."""
    e = row.evaluation
    return (
        NAMES.get(e.method, e.method),
        f"{e.pruning_ratio:.0%}",
        f"{e.perplexity:.2f}",
        _number(row.degradation, "+.2f"),
        f"{e.flops_ratio:.3f}",
        _number(row.time_ratio, ".3f"),
        _number(row.efficiency, ".2f"),
        _number(row.prr, ".3g"),
        f"{e.time.median:.1f} ({e.time.fastest:.1f}-{e.time.slowest:.1f})",
        _range(e.kept.get("attention")),
        _range(e.kept.get("mlp")),
    )


def show(rows: Sequence[Comparison], caption: str) -> None:
    """Print the table to the terminal."""
    table = Table(caption=caption, caption_justify="left")
    for index, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*cells(row))
    Console(width=None).print(table)


def markdown(rows: Sequence[Comparison], caption: str) -> str:
    """The table in Markdown, with its caption below."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---" + "|---:" * (len(HEADINGS) - 1) + "|"]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    return "\n".join([*lines, "", caption, ""])


def comma_separated(rows: Sequence[Comparison]) -> str:
    """All figures unrounded, one row a line."""
    flat = [_flat(row) for row in rows]
    text = io.StringIO()
    fields = dict.fromkeys(field for row in flat for field in row)  # the dense row has no kept counts
    writer = csv.DictWriter(text, fieldnames=list(fields))
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def plot(rows: Sequence[Comparison], caption: str, path: Path) -> None:
    """Perplexity over FLOPs, one line a method, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and only needed here
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    dense = rows[0].evaluation
    for label in dict.fromkeys(row.evaluation.method for row in rows[1:]):
        points = [(dense.flops_ratio, dense.perplexity)]
        points += [
            (row.evaluation.flops_ratio, row.evaluation.perplexity) for row in rows if row.evaluation.method == label
        ]
        x, y = zip(*sorted(points, reverse=True), strict=True)
        axes.plot(x, y, marker="o", label=NAMES.get(label, label))
    axes.plot([dense.flops_ratio], [dense.perplexity], marker="*", markersize=14, color="black", linestyle="none")
    axes.annotate(
        "dense", (dense.flops_ratio, dense.perplexity), xytext=(-8, 10), textcoords="offset points", ha="right"
    )
    axes.invert_xaxis()
    axes.set(xlabel="FLOPs relative to dense (probe included)", ylabel="perplexity", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.supxlabel(caption, fontsize=6)
    FigureCanvasAgg(figure)
    figure.savefig(path)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _range(counts: tuple[int, int] | None) -> str:
    if counts is None:
        return "all"
    low, high = counts
    return str(low) if low == high else f"{low}-{high}"


def _flat(row: Comparison) -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in row.as_dict().items():
        if key == "time":
            flat |= {f"ms_{name}": number for name, number in value.items()}
        elif key == "kept":
            for block, (low, high) in value.items():
                flat |= {f"{block}_kept_min": low, f"{block}_kept_max": high}
        elif key != "settings":
            flat[key] = value
    return flat
