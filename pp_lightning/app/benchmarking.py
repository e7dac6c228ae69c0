"""``pp-lightning benchmark``: the measuring part's settings as options, and a picture of what it found."""

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from pp_lightning.app.pictures import picture
from pp_lightning.app.words import spelled_out
from pp_lightning.benchmark import BenchmarkSettings
from pp_lightning.benchmark.rows import Row
from pp_lightning.benchmark.write import caption, measure_into


def main(words: Sequence[str]) -> None:
    """Read the options, measure, write and show."""
    parser = ArgumentParser(prog="pp-lightning benchmark", allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with any of these settings.")
    parser.add_argument("--out", default="results/benchmark", help="Folder that everything is written into.")
    parser.add_class_arguments(BenchmarkSettings)
    options = parser.parse_args(spelled_out(["benchmark", *words])[1:]).as_dict()
    options.pop("config")
    out = Path(options.pop("out"))
    settings = BenchmarkSettings.from_plain(options)
    rows = measure_into(out, settings)
    if not rows:
        return
    plot(rows, caption(settings), out / "results.png")
    rank_zero_info("written to %s", out)


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Efficiency of the decoder as bars: one picture per case, compiled beside eager."""
    measured = [row for row in rows if row.part == "decoder" and not row.variant.startswith("dense")]
    cases = list(dict.fromkeys(row.case for row in measured))
    with picture(path, 1 + 4.2 * len(cases), 5, title) as figure:
        for axis, case in zip(figure.subplots(1, len(cases), sharey=True, squeeze=False)[0], cases, strict=True):
            own = [row for row in measured if row.case == case][::-1]
            colours = ["tab:blue" if row.variant.endswith("compiled") else "tab:orange" for row in own]
            axis.barh([row.variant for row in own], [row.efficiency for row in own], color=colours)
            axis.axvline(1.0, color="black", linewidth=0.8)
            axis.set_title(case, fontsize=10)
            axis.set_xlabel("efficiency: FLOPs ratio / time ratio")
