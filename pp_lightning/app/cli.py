"""Entry point of ``pp-lightning``. It stays light: help is shown, and most mistakes are found, in a second."""

import contextlib
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from pp_lightning.app.descriptions import COMMANDS
from pp_lightning.app.help import help_for
from pp_lightning.app.mistakes import in_one_line, mistake_behind
from pp_lightning.errors import UserError, unknown

_OWN_PARSER = {"benchmark": "benchmarking", "plan": "planning", "demo": "demo"}  # commands by module


def main() -> None:
    """Run a command: a mistake of the user's is one line and exit code 2."""
    words = sys.argv[1:]
    text = help_for(words or ["--help"])
    if text is not None:
        with contextlib.suppress(BrokenPipeError):
            print(text)
        sys.exit(0)
    if words[0] == "--version":
        print(f"pp-lightning {version('pp-lightning')}")
        sys.exit(0)
    try:
        _run(words)
    except Exception as error:
        mistake = mistake_behind(error)
        if mistake is None:
            raise
        print(in_one_line(mistake, words[0]), file=sys.stderr)
        sys.exit(2)


def _run(words: Sequence[str]) -> None:
    command, *rest = words
    if command not in COMMANDS:
        raise unknown("command", command, COMMANDS)
    if command == "lm-eval":
        _run_harness(rest)
    elif command in _OWN_PARSER:
        import_module(f"pp_lightning.app.{_OWN_PARSER[command]}").main(rest)
    else:
        from pp_lightning.app import commands

        commands.run(words)


def _run_harness(words: Sequence[str]) -> None:
    """lm-evaluation-harness's own command line, with pruned models as its model ``pp``."""
    try:
        from pp_lightning.commonsense import harness  # an extra, and slow to import
    except ImportError as error:
        raise UserError("lm-eval needs lm-evaluation-harness: pip install 'pp-lightning[eval]'") from error
    sys.argv = ["pp-lightning lm-eval", *words]
    harness.main()
