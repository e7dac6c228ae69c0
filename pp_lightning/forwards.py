"""Another ``forward`` for a module: same object, same class, same weights.

accelerate, which spreads a model over devices (``device_map``), wraps a module's ``forward`` and moves its inputs to
the module's device. What replaces a ``forward`` goes inside of that.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn


def is_wrapped(module: nn.Module) -> bool:
    """Whether accelerate has wrapped the module's ``forward``."""
    return hasattr(module, "_hf_hook")


def innermost_forward(module: nn.Module) -> Callable[..., Any]:
    """What a module runs, without what accelerate has put around it."""
    forward: Callable[..., Any] = getattr(module, _place(module))
    return forward


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Let a module run ``forward``."""
    setattr(module, _place(module), forward)


def restore_forward(module: nn.Module) -> None:
    """Let a module run what its class says."""
    if _place(module) == "forward":
        del module.forward
    else:
        setattr(module, _place(module), MethodType(type(module).forward, module))


def _place(module: nn.Module) -> str:
    return "_old_forward" if is_wrapped(module) else "forward"
