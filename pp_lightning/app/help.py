"""How ``--help`` looks."""

from argparse import RawDescriptionHelpFormatter

from jsonargparse import DefaultHelpFormatter


class ExamplesFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the examples as they are written."""
