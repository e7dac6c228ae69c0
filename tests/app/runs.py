"""The program several times in one process, as ``python -m torch.distributed.run`` starts it in each of several.

python -m tests.app.runs FILE        FILE: a JSON list of command lines
"""

import json
import sys
from pathlib import Path

from pp_lightning.app.cli import main


def run(words: list[str]) -> None:
    """Once, as if it had been typed."""
    sys.argv = ["pp-lightning", *words]
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            raise


if __name__ == "__main__":
    for line in json.loads(Path(sys.argv[1]).read_text()):
        run(line)
