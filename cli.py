"""Console entry point: ``pp-lightning``."""

from pp_lightning.app.cli import main

if __name__ == "__main__":
    main()
