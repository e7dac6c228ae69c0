"""Packages that some formats need, extras of ours."""

from importlib import import_module

from pp_lightning.errors import UserError


def check_packages(what: str, extra: str, *modules: str) -> None:
    """Refuse what is missing on this machine."""
    for name in modules:
        try:
            import_module(name)
        except ImportError as error:
            raise UserError(f"{what} needs {error.name}: pip install 'pp-lightning[{extra}]'") from error
