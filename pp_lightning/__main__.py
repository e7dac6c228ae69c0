"""``pp-lightning`` and ``python -m pp_lightning``: the command line, or what to install for it."""

import sys

# what the extra "app" brings
_NEEDED = {"datasets", "jsonargparse", "lightning", "matplotlib", "rich", "tokenizers", "torchmetrics"}


def main() -> None:
    """Run the command line; where the packages that it needs are missing, say so in one line, with exit code 2."""
    try:
        from pp_lightning.app.cli import main as run

        run()
    except KeyboardInterrupt:
        print("pp-lightning: interrupted", file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in _NEEDED:
            raise
        print(f"pp-lightning: the command line needs {error.name}: pip install 'pp-lightning[app]'", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
