"""From settings to results, for eyes and for machines."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pp_lightning.benchmark.break_even import write_break_even
from pp_lightning.benchmark.model import chosen_device
from pp_lightning.benchmark.rows import Row, grids
from pp_lightning.benchmark.run import run_benchmark
from pp_lightning.benchmark.settings import BenchmarkSettings
from pp_lightning.progress import write_line
from pp_lightning.records import check_place, environment
from pp_lightning.tables import markdown, write_report


def measure_into(out: Path, settings: BenchmarkSettings) -> list[Row]:
    """Measure, write and show what the settings ask for; no rows where that is the break-even of probes."""
    check_place(out)
    if settings.calibrate_break_even:
        print(write_break_even(settings, out, write_line))
        return []
    rows = run_benchmark(settings, tell=write_line, keep=lambda so_far: write_results(so_far, settings, out))
    print(write_results(rows, settings, out))
    return rows


def write_results(rows: Sequence[Row], settings: BenchmarkSettings, out: Path) -> str:
    """Write ``results.json``, ``results.csv`` and ``results.md``."""
    text, lines = markdown(grids(rows), caption(settings)), [row.as_dict() for row in rows]
    machine = environment(chosen_device(settings), 1)
    write_report(out / "results", text, {"settings": asdict(settings), "environment": machine, "rows": lines}, lines)
    return text


def caption(settings: BenchmarkSettings) -> str:
    """What a table must say about itself."""
    machine = environment(chosen_device(settings), 1)
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items() if name in _NAMED)
    model = settings.model.path or f"{settings.model.shape}, random weights"
    layers = "" if settings.model.layers is None else f", {settings.model.layers} layers"
    return (
        f"{model}{layers}; {machine['device_name']}, {machine['threads']} threads; {versions}; {settings.repeats} "
        f"rounds over {settings.batches} different batches, all variants interleaved; time ratios are medians of the "
        "ratios within each round, against the dense model compiled where the variant is"
    )


_NAMED = ("torch", "transformers")
