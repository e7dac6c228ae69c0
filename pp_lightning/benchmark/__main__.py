"""``python -m pp_lightning.benchmark``: the measuring part alone, where Lightning is not installed."""

import argparse
import sys
from pathlib import Path

import yaml

from pp_lightning.benchmark.settings import BenchmarkSettings
from pp_lightning.benchmark.write import measure_into
from pp_lightning.errors import UserError


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m pp_lightning.benchmark", description=BenchmarkSettings.__doc__)
    parser.add_argument("--config", required=True, help="YAML file of settings")
    parser.add_argument("--out", default="results/benchmark", help="folder for results.json, .csv and .md")
    options = parser.parse_args()
    try:
        settings = BenchmarkSettings.from_plain(yaml.safe_load(Path(options.config).read_text()) or {})
        measure_into(Path(options.out), settings)
    except (UserError, OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        print(f"pp_lightning.benchmark: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
