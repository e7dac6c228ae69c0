"""The loss of a recovery training, step by step, for machines and for eyes."""

from collections.abc import Sequence
from pathlib import Path

from pp_lightning.app.pictures import picture
from pp_lightning.records import write_text
from pp_lightning.tables import comma_separated


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
