"""Prune large language models for real: per batch with a probe, or once and for all.

The library needs torch, transformers and safetensors; Lightning and the command line are in :mod:`pp_lightning.app`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pp_lightning.calibration import calibrate
    from pp_lightning.checkpoints import load_streamed
    from pp_lightning.compilation import compile_, uncompile_
    from pp_lightning.errors import UserError
    from pp_lightning.gradients import taylor_importances
    from pp_lightning.importances import Importances
    from pp_lightning.pruning import KeptUnits, frozen_history, kept_units, prune_, unprune_
    from pp_lightning.state import load_pruning_state, pruning_state, skipped_batches
    from pp_lightning.statistics import Statistics
    from pp_lightning.updating import LeastSquares

# Loaded when they are first asked for: `pp-lightning --help` needs none of them, and importing torch takes seconds.
_PLACES = {
    "calibration": ("calibrate",),
    "checkpoints": ("load_streamed",),
    "compilation": ("compile_", "uncompile_"),
    "errors": ("UserError",),
    "gradients": ("taylor_importances",),
    "importances": ("Importances",),
    "pruning": ("KeptUnits", "frozen_history", "kept_units", "prune_", "unprune_"),
    "state": ("load_pruning_state", "pruning_state", "skipped_batches"),
    "statistics": ("Statistics",),
    "updating": ("LeastSquares",),
}
_MODULES = {name: module for module, names in _PLACES.items() for name in names}

__all__ = [
    "Importances",
    "KeptUnits",
    "LeastSquares",
    "Statistics",
    "UserError",
    "calibrate",
    "compile_",
    "frozen_history",
    "kept_units",
    "load_pruning_state",
    "load_streamed",
    "prune_",
    "pruning_state",
    "skipped_batches",
    "taylor_importances",
    "uncompile_",
    "unprune_",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
