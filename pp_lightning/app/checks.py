"""Settings that contradict each other or can mean nothing, refused before a model is loaded."""

import math
from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any

from pp_lightning.errors import UserError
from pp_lightning.methods import METHODS, DynamicMethod
from pp_lightning.methods.gradient import GradientMethod
from pp_lightning.records import check_new_file

_RATIOS = ("pruning_ratio", "attention_ratio", "mlp_ratio")
_OF_DYNAMIC = ("frozen_on", "refresh", "prefill")
_GLOBAL = ("global", "searched")
_MOST_OF_A_SEED = 2**32 - 1


def check_settings(command: str, settings: Mapping[str, Any]) -> None:
    """Refuse what cannot be meant."""
    if not str(settings["out"]).strip():
        raise UserError("--out must name a folder: it is empty")
    check_seed("seed_everything", settings["seed_everything"])
    model = settings["model"]
    _check_training(model)
    for name in ("statistics", "importances"):
        if model[name] is not None:
            check_new_file(model[name], f"--model.{name}")
    for name in _RATIOS:
        check_ratio(f"model.{name}", model[name])
    _check_uniform(model)
    if command == "compare":
        if model["pruning_ratio"] is not None:
            raise UserError("compare takes --ratios [0.2,0.4] in place of --model.pruning_ratio")
        if model["method"] is not None:
            raise UserError("compare takes --methods [pp,best] in place of --model.method")
    elif model["recovered"] is None and model["recovery"] is None:
        _check_method(command, model)


def check_seed(name: str, seed: Any) -> None:
    """Refuse a seed that no generator takes."""
    if not isinstance(seed, bool) and seed is not None and not 0 <= seed <= _MOST_OF_A_SEED:
        raise UserError(f"{name} must be from 0 to {_MOST_OF_A_SEED}, not {seed}")


def check_ratio(name: str, ratio: float | None) -> None:
    """Refuse what is no fraction that leaves something."""
    if ratio is not None and not 0.0 <= ratio < 1.0:
        raise UserError(f"{name} must be in [0, 1), not {ratio}")


def _check_uniform(model: Mapping[str, Any]) -> None:
    if not model["uniform"]:
        return
    if model["skip_layers"]:
        raise UserError(
            "--model.uniform prunes every layer alike and --model.skip_layers leaves some: add --model.skip_layers null"
        )
    if model["allocation"] not in (None, "uniform"):
        raise UserError(f"--model.uniform and --model.allocation {model['allocation']} contradict: leave one out")


def _check_training(model: Mapping[str, Any]) -> None:
    if model["warmup_steps"] < 0:
        raise UserError(f"--model.warmup_steps must be at least 0, not {model['warmup_steps']}")
    if not 0.0 < model["learning_rate"] < math.inf:
        raise UserError(f"--model.learning_rate must be above 0, not {model['learning_rate']}")
    if not 0.0 <= model["weight_decay"] < math.inf:
        raise UserError(f"--model.weight_decay must be at least 0, not {model['weight_decay']}")


def _check_method(command: str, model: Mapping[str, Any]) -> None:
    """Settings that are for some methods, or for any."""
    given = model["method"]
    if given is None:
        alone = [name for name in (*_RATIOS, "frozen_on", "refresh", "update") if model[name] is not None]
        if alone and command != "prune":
            names = ", ".join(METHODS)
            raise UserError(f"--model.{alone[0]} needs a method: add --method pp (or best, or one of {names})")
        return
    method = resolve_name(given["class_path"])
    if model["importances"] is not None and not issubclass(method, GradientMethod):
        raise UserError(f"--model.importances is for llm_pruner and lora_prune, and {method.__name__} reads none")
    if issubclass(method, DynamicMethod):
        if model["update"] is not None:
            raise UserError(f"--model.update is for static methods, and {method.__name__} chooses per batch")
    else:
        for name in _OF_DYNAMIC:
            if model[name] is not None:
                raise UserError(f"--model.{name} is for methods that choose per batch, and {method.__name__} is static")
    allocation = model["allocation"] or (given.get("init_args") or {}).get("allocation") or method.allocation
    if model["floor"] is not None and allocation not in _GLOBAL:
        raise UserError(
            "--model.floor is for one ranking over all layers: add --model.allocation global, or leave it out"
        )
