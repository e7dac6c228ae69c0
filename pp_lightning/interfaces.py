"""Private interfaces of other packages, each with its reason, and what happens where one is missing.

Nothing else in the library reaches for a name that its owner does not document. Nothing here fails at import.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

# accelerate: device_map wraps a module's ``forward`` to move its inputs, and keeps the old one here. What replaces a
# ``forward`` goes inside of that. Without accelerate no module has these.
_HOOK, _OLD_FORWARD = "_hf_hook", "_old_forward"

# peft keeps what an adapter adds to a weight behind this method. Without it the base weight alone is scored.
_DELTA_WEIGHT = "get_delta_weight"


def is_wrapped(module: nn.Module) -> bool:
    """Whether accelerate has wrapped the module's ``forward``."""
    return hasattr(module, _HOOK)


def run_stock(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call what a module's class computes, whatever has replaced the object's ``forward``."""
    return type(module).forward(module, *args, **kwargs)


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Of the arguments that a module's ``forward`` takes by position, in order."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(one.name for one in parameters if one.kind in by_position)[1:]


def first_argument(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states that a module was called with, by position or by name."""
    found: Tensor = args[0] if args else kwargs[argument_names(module)[0]]
    return found


def without_head(model: Any) -> nn.Module:
    """The part of a model that makes hidden states of a batch; the model itself, where that cannot be called alone.

    ``base_model`` is whatever module has the name that the class says. In a few classes of images that is a part which
    no longer takes images.
    """
    base: nn.Module = model.base_model
    return base if model.main_input_name in argument_names(base) else model


INPUTS = ("input_ids", "attention_mask", "pixel_values")  # of a batch, that a model without its head is called with


def model_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch a model without its head is called with, on its device and without a cache.

    Args:
        model: a transformers model.
        batch: ``input_ids`` (B, S) or ``pixel_values``, and optionally ``attention_mask`` (B, S).
    """
    given = {name: batch[name].to(model.device) for name in INPUTS if name in batch}
    if getattr(model.config, "use_cache", None) is not None and "input_ids" in given:
        given["use_cache"] = False
    return given


def current_forward(module: nn.Module) -> Callable[..., Any]:
    """What a module runs, without what accelerate has put around it."""
    forward: Callable[..., Any] = getattr(module, _place(module))
    return forward


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Let a module run ``forward``: same object, same class, same weights."""
    setattr(module, _place(module), forward)


def restore_forward(module: nn.Module) -> None:
    """Let a module run what its class says."""
    if _place(module) == "forward":
        module.__dict__.pop("forward", None)
    else:
        setattr(module, _OLD_FORWARD, MethodType(type(module).forward, module))


def _place(module: nn.Module) -> str:
    return _OLD_FORWARD if is_wrapped(module) else "forward"


def adapted_weight(projection: Any) -> Tensor:
    """The matrix (out, in) that a projection multiplies with, what adapters add to it included."""
    weight: Tensor = projection.weight
    delta = getattr(projection, _DELTA_WEIGHT, None)
    if delta is None:
        return weight
    total = weight.detach().float()
    for name in getattr(projection, "active_adapters", ()):
        total = total + delta(name).detach().float()
    return total.to(weight.dtype)


def attention_implementation(model: nn.Module) -> str:
    """How a model computes attention, as ``set_attn_implementation`` takes it: transformers has no public getter."""
    return str(getattr(model.config, "_attn_implementation", "eager"))


def unfused_on_cpus(mask: Any) -> AbstractContextManager[object]:
    """Run flex attention on a CPU as it is written, not compiled, for a while.

    Its kernels for CPUs come in one length each where there is padding: a second one, which a probe is, gives code that
    does not compile in torch 2.13. Elsewhere nothing changes.

    Args:
        mask: what attention is given; flex attention gets a ``BlockMask``.
    """
    if isinstance(mask, (Tensor, type(None))) or torch.compiler.is_compiling():
        return nullcontext()
    on_cpu = mask.kv_indices.device.type == "cpu"
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager") if on_cpu else nullcontext()
    return stance


def compilations() -> list[Any]:
    """What dynamo has compiled lately: its metrics are the only record of graphs, their times and reasons."""
    try:
        from torch._dynamo.utils import get_compilation_metrics
    except ImportError:
        return []
    return list(get_compilation_metrics())


def dynamo_settings(**settings: Any) -> AbstractContextManager[object]:
    """Dynamo's options for a while; they have no public switch. Unknown ones are left out."""
    known = {name: value for name, value in settings.items() if hasattr(torch._dynamo.config, name)}
    patched: AbstractContextManager[object] = torch._dynamo.config.patch(known)
    return patched


@contextmanager
def sizes_without_special_cases() -> Iterator[None]:
    """Let ``torch.export`` take sizes of 0 and 1 for sizes like others: an option without a public name."""
    try:
        from torch.fx.experimental import _config
    except ImportError:
        patch: AbstractContextManager[object] = nullcontext()
    else:
        patch = _config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with patch:
        yield
