"""The command line from a checkout: ``python cli.py``. Installed, it is ``pp-lightning`` (pp_lightning/app/cli.py)."""

from pp_lightning.__main__ import main

if __name__ == "__main__":
    main()
