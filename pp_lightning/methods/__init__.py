"""Pruning methods, one file each. A new one is a file here and an entry in ``METHODS``."""

from collections.abc import Callable, Mapping
from functools import partial

from pp_lightning.errors import unknown
from pp_lightning.methods.after_ocp import AfterOCP
from pp_lightning.methods.base import PruningMethod, StaticMethod
from pp_lightning.methods.dynamic import DynamicMethod
from pp_lightning.methods.flap import FLAP
from pp_lightning.methods.full_batch_probing import FullBatchProbing
from pp_lightning.methods.griffin import Griffin
from pp_lightning.methods.llm_pruner import LLMPruner
from pp_lightning.methods.lora_prune import LoRAPrune
from pp_lightning.methods.probe_pruning import ProbePruning
from pp_lightning.methods.static_best import StaticBest
from pp_lightning.methods.static_ppsp import StaticPPsp
from pp_lightning.methods.updated import Updated
from pp_lightning.methods.wanda_sp import WandaSP


def _updated(method: type[StaticMethod]) -> PruningMethod:
    return Updated(method())


METHODS: Mapping[str, type[PruningMethod]] = {
    method.label: method
    for method in (
        *(FullBatchProbing, ProbePruning, AfterOCP, Griffin),
        *(StaticBest, StaticPPsp, FLAP, WandaSP, LLMPruner, LoRAPrune),
    )
}

# Settings of these methods that have a name of their own.
PRESETS: Mapping[str, Callable[[], PruningMethod]] = {
    "best": ProbePruning.best,
    "best_generation": partial(ProbePruning.best, generation=True),
}

# Static methods whose kept weights take over what went.
UPDATED: Mapping[str, Callable[[], PruningMethod]] = {
    f"{label}_updated": partial(_updated, method)
    for label, method in METHODS.items()
    if issubclass(method, StaticMethod) and not method.updates and method is not LoRAPrune
}


def _named() -> dict[str, Callable[[], PruningMethod]]:
    return {**METHODS, **PRESETS, **UPDATED}


def method_labels() -> list[str]:
    """The names that :func:`method_named` knows."""
    return list(_named())


def method_named(label: str) -> PruningMethod:
    """A method with its default settings, or a preset."""
    named = _named()
    if label not in named:
        raise unknown("method", label, named)
    return named[label]()


def name_of(method: PruningMethod) -> str:
    """The name under which tables show a method: a preset's, where it has its settings, otherwise its label."""
    for name, preset in PRESETS.items():
        known = preset()
        if type(known) is type(method) and known.settings() == method.settings():
            return name
    return method.label


__all__ = [
    "FLAP",
    "METHODS",
    "PRESETS",
    "AfterOCP",
    "DynamicMethod",
    "FullBatchProbing",
    "Griffin",
    "LLMPruner",
    "LoRAPrune",
    "ProbePruning",
    "PruningMethod",
    "StaticBest",
    "StaticMethod",
    "StaticPPsp",
    "Updated",
    "WandaSP",
    "method_labels",
    "method_named",
    "name_of",
]
