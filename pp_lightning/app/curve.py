"""The loss of a recovery training, step by step, for machines and for eyes."""

from collections.abc import Sequence
from pathlib import Path

from pp_lightning.records import write_text


def write_curve(losses: Sequence[float], pruned: Sequence[float], folder: Path) -> None:
    """Write ``training.csv`` and ``training.png``.

    Args:
        losses: mean loss of each optimiser step.
        pruned: share of the ratio that was reached after each step.
        folder: where to.
    """
    lines = [f"{n},{loss},{share}" for n, (loss, share) in enumerate(zip(losses, pruned, strict=True), start=1)]
    write_text(folder / "training.csv", "\n".join(["step,loss,pruned", *lines, ""]))
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and only needed here
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot(xlabel="optimiser step", ylabel="training loss")
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, linewidth=1)
    axes.grid(alpha=0.3)
    if len(set(pruned)) > 1:
        other = axes.twinx()
        other.plot(steps, pruned, color="black", linestyle=":", linewidth=1)
        other.set(ylabel="share of the ratio removed (dotted)", ylim=(0, 1.05))
    FigureCanvasAgg(figure)
    figure.savefig(folder / "training.png")
