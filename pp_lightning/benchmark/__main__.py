"""``python -m pp_lightning.benchmark``: the measuring part alone, where Lightning is not installed."""

import argparse
import sys
from pathlib import Path

import yaml

from pp_lightning.benchmark.break_even import write_break_even
from pp_lightning.benchmark.run import run_benchmark
from pp_lightning.benchmark.settings import BenchmarkSettings
from pp_lightning.benchmark.write import write_results
from pp_lightning.errors import UserError
from pp_lightning.progress import write_line
from pp_lightning.records import check_place


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m pp_lightning.benchmark", description=BenchmarkSettings.__doc__)
    parser.add_argument("--config", required=True, help="YAML file of settings")
    parser.add_argument("--out", default="results/benchmark", help="folder for results.json, .csv and .md")
    options = parser.parse_args()
    try:
        settings = BenchmarkSettings.from_plain(yaml.safe_load(Path(options.config).read_text()) or {})
        check_place(Path(options.out))
        if settings.calibrate_break_even:
            print(write_break_even(settings, Path(options.out), write_line))
            return
        rows = run_benchmark(
            settings, tell=write_line, keep=lambda so_far: write_results(so_far, settings, Path(options.out))
        )
    except (UserError, OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        print(f"pp_lightning.benchmark: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    print(write_results(rows, settings, Path(options.out)))


if __name__ == "__main__":
    main()
