"""``make demo``: what pruning costs and saves, on text of the calibration's kind and on text of another kind."""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pp_lightning.app.commands import TRAINER_DEFAULTS, quiet
from pp_lightning.app.module import PrunedLM
from pp_lightning.app.pictures import picture
from pp_lightning.app.progress import progress_display
from pp_lightning.app.report import name_of, show_grid
from pp_lightning.app.results import Comparison
from pp_lightning.app.trainer import PruningTrainer
from pp_lightning.data import Embedded, LanguageModelling
from pp_lightning.records import check_place, environment
from pp_lightning.tables import Grid, markdown, write_report

METHODS = ["flap", "ppsp", "pp", "best", "best_generation", "static_best"]
RATIO = 0.4
TEXTS = {"documentation": Embedded("test"), "code": Embedded("test", "code")}  # calibrated on the first kind
_BEFORE = """\
This takes about a minute on two idle cores. {count} methods remove {ratio:.0%} of a small model's heads and
MLP channels. All are calibrated on Python's documentation, and scored on documentation and on code, which
is another kind of text: 128 tokens of each window choose (the prompt), the 128 behind them are scored."""

Rows = Mapping[str, Sequence[Comparison]]


def main(words: Sequence[str] | None = None) -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(prog="pp-lightning demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/demo"), help="folder that everything is written into")
    out = parser.parse_args(words).out
    check_place(out)
    quiet()
    print(_BEFORE.format(ratio=RATIO, count=len(METHODS)), flush=True)
    rows = compared(out)
    _write(rows, out)


def compared(out: Path, **settings: Any) -> dict[str, list[Comparison]]:
    """All methods on both texts, the dense model first.

    ``settings`` are of the data, in place of the demo's own.
    """
    model = PrunedLM(skip_layers=[0, 1, 2], round_to=16)
    rows: dict[str, list[Comparison]] = {}
    sizes: dict[str, Any] = {
        "window": 256,
        "batch_size": 10,
        "calibration_samples": 48,
        "limit_tokens": 10240,
    } | settings
    with tempfile.TemporaryDirectory() as folder:
        model.update_folder = Path(folder)  # the second text finds the update of the first one there
        for name, text in TEXTS.items():
            data = LanguageModelling(text, Embedded("calibration"), protocol="continuation", **sizes)
            options = TRAINER_DEFAULTS | {"accelerator": "cpu", "callbacks": [progress_display()]}
            trainer = PruningTrainer(**options, default_root_dir=Path(folder) / name)
            rows[name] = trainer.compare(model, data, methods=METHODS, ratios=[RATIO])
    return rows


def table(rows: Rows) -> Grid:
    """One row a method, two columns a text."""
    headings = ["method", "FLOPs", "time"]
    for text in rows:
        headings += [text, "lost"]
    cells: list[tuple[str, ...]] = []
    dense, *_ = every = list(zip(*rows.values(), strict=True))
    for found in every:
        first = found[0]
        line = [_name(first), f"{_flops(first):.2f}", f"{_fastest(found) / _fastest(dense):.2f}"]
        for row in found:
            line += [f"{_perplexity(row):.2f}", f"+{row.degradation:.2f}" if row.degradation else ""]
        cells.append(tuple(line))
    return Grid("", tuple(headings), cells)


def in_words(rows: Rows, out: Path) -> list[str]:
    """Three lines: what was best, what it saved, where the picture is."""
    best: list[str] = []
    saved: dict[str, str] = {}
    dense, *_ = every = list(zip(*rows.values(), strict=True))
    for text, (_, *others) in rows.items():
        first, last = min(others, key=_perplexity), max(others, key=_perplexity)
        best.append(f"{_name(first)} on {text} (+{first.degradation:.1f}; {_name(last)} +{last.degradation:.1f})")
        time = _fastest(next(each for each in every if first in each)) / _fastest(dense)
        saved[_name(first)] = f"{1 - _flops(first):.0%} of the FLOPs, {1 - time:.0%} of the time"
    parts = "; ".join(f"{name} {part}" for name, part in saved.items())
    return [
        f"Best: {', '.join(best)}.",
        f"Saved against the dense model, on this machine: {parts}.",
        f"Picture: {out / 'demo.png'} (beside it the table, demo.md, and all figures, demo.json).",
    ]


def plot(rows: Rows, path: Path) -> None:
    """Perplexity of every method as bars, one panel a text, the dense model as a line."""
    with picture(path, 9, 3.6) as figure:
        for number, (text, found) in enumerate(rows.items()):
            axes = figure.add_subplot(1, len(rows), number + 1)
            dense, others = _perplexity(found[0]), found[1:]
            values = [_perplexity(row) for row in others]
            colors = ["tab:orange" if "(ours)" in _name(row) else "tab:blue" for row in others]
            bars = axes.barh([_name(row) for row in others], values, color=colors)
            axes.bar_label(bars, fmt="%.1f", padding=3)
            axes.axvline(dense, color="black", linestyle="--")
            axes.set(title=f"{text} (dense: {dense:.1f}, dashed)", xlabel="perplexity", xlim=(0, 1.15 * max(values)))
            axes.tick_params(axis="y", labelleft=number == 0)
            axes.invert_yaxis()
        figure.suptitle(f"{RATIO:.0%} of heads and channels removed, calibrated on documentation")


def _write(rows: Rows, out: Path) -> None:
    grid, words = table(rows), in_words(rows, out)
    about = (
        "FLOPs and time are relative to the dense model's: FLOPs of what follows the prompt, time of the\n"
        "fastest batch.\n"
        "'documentation' and 'code' are perplexities behind the prompt, 'lost' is how much they are above dense."
    )
    figures = {text: [row.as_dict() for row in found] for text, found in rows.items()}
    record = {"environment": environment(torch.device("cpu"), 1), "rows": figures}
    write_report(out / "demo", markdown([grid], "\n".join([about, "", *words])), record)
    plot(rows, out / "demo.png")
    show_grid(grid)
    print("\n".join([about, "", *words]))


def _name(row: Comparison) -> str:
    return name_of(row.evaluation.method)


def _perplexity(row: Comparison) -> float:
    assert row.evaluation.perplexity is not None
    return row.evaluation.perplexity


def _flops(row: Comparison) -> float:
    after = row.evaluation.flops.after_prompt
    return row.evaluation.flops.model if after is None else after


def _fastest(found: Sequence[Comparison]) -> float:
    """Milliseconds of a method's fastest batch of either text: of a few batches, what other work disturbed least."""
    return min(row.evaluation.time.fastest for row in found if row.evaluation.time is not None)


if __name__ == "__main__":
    main()
