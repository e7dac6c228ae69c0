"""Under which name models and layers of transformers take a key/value cache, and give it back."""

from collections.abc import Mapping
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

# Transformers 5.24 renamed the second to the first. Layers of a few families are given the third.
_NAMES = ("cache", "past_key_values", "layer_past")

# Of this transformers: the argument of a model, and the part of its output.
CACHE = next(name for name in _NAMES if name in BaseModelOutputWithPast.__dataclass_fields__)


def cache_name(given: Mapping[str, Any]) -> str | None:
    """Under which name arguments of a model, layer or block hold a cache; None where they hold none.

    A hook of a model's part sees the old name too, where the caller still says it: it is changed after the hook.
    """
    return next((name for name in _NAMES if given.get(name) is not None), None)


def cache_in(given: Mapping[str, Any]) -> Any:
    """The cache among arguments, by name; None where there is none."""
    name = cache_name(given)
    return None if name is None else given[name]


def without_cache(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, so that no cache is read or filled."""
    none: dict[str, Any] = dict.fromkeys(_NAMES) | {"use_cache": False}
    return {name: none.get(name, value) for name, value in given.items()}
