"""Private interfaces of other packages, each with its reason, and what happens where one is missing.

Nothing else in the library reaches for a name that its owner does not document. Nothing here fails at import.
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from ctypes import CDLL
from functools import lru_cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

# accelerate: device_map wraps a module's ``forward`` to move its inputs, and keeps the old one here. What replaces a
# ``forward`` goes inside of that. Without accelerate no module has these.
_HOOK, _OLD_FORWARD = "_hf_hook", "_old_forward"

# transformers: what a layer under gradient checkpointing calls to be run now, and again for its gradients. Without it
# nothing stands around that, and a pruned layer that is run again says so.
_CHECKPOINT = "_gradient_checkpointing_func"

# peft keeps what an adapter adds to a weight behind this method. Without it the sum is seen on unit vectors.
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


# Of a batch, that a model without its head is called with.
INPUTS = ("input_ids", "attention_mask", "position_ids", "pixel_values")


def model_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch a model without its head is called with, on its device and without a cache.

    Args:
        model: a transformers model.
        batch: ``input_ids`` (B, S) or ``pixel_values``, and optionally ``attention_mask`` and ``position_ids`` (B, S).
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


def displaced_forward(module: nn.Module) -> Callable[..., Any] | None:
    """What somebody has put in the place of one module's ``forward``; None where it is that of its class."""
    forward: Callable[..., Any] | None = vars(module).get(_place(module))
    return None if getattr(forward, "__func__", None) is type(module).forward else forward


def restore_forward(module: nn.Module, displaced: Callable[..., Any] | None = None) -> None:
    """Let a module run what its class says, or what :func:`displaced_forward` found."""
    if displaced is not None:
        setattr(module, _place(module), displaced)
    elif _place(module) == "forward":
        module.__dict__.pop("forward", None)
    else:
        setattr(module, _OLD_FORWARD, MethodType(type(module).forward, module))


def _place(module: nn.Module) -> str:
    return _OLD_FORWARD if is_wrapped(module) else "forward"


@torch.no_grad()
def effective_weight(projection: Any) -> Tensor:
    """The matrix (out, in) of a projection that is no plain Linear: adapted, quantised, of low rank.

    What adapters add is asked of them; of anything else the matrix is seen on unit vectors.
    """
    weight: Any = getattr(projection, "weight", None)
    delta: Any = getattr(projection, _DELTA_WEIGHT, None)
    known = delta is not None and type(weight) is nn.Parameter and weight.is_floating_point()
    if not known or any(getattr(projection, "use_dora", {}).values()):  # which scales the sum
        return _seen_weight(projection)
    total = weight.detach().float()
    acts = not (projection.merged or projection.disable_adapters)
    for name in projection.active_adapters if acts else ():
        if name in projection.scaling:
            total = total + delta(name).detach().float()
    adapted: Tensor = total.to(weight.dtype)
    return adapted


def _seen_weight(projection: Any, at_once: int = 1024) -> Tensor:
    """The matrix (out, in) of a module that maps the last dimension linearly, column by column."""
    tensors = [*projection.parameters(), *projection.buffers()]
    dtype = next((one.dtype for one in tensors if one.is_floating_point()), torch.get_default_dtype())
    width = getattr(projection, "in_features", None) or projection.weight.shape[1]
    trained = [module for module in projection.modules() if module.training]
    projection.eval()
    try:
        start = projection.forward(torch.zeros(1, width, dtype=dtype, device=tensors[0].device))
        columns = []
        for first in range(0, width, at_once):
            units = torch.zeros(min(at_once, width - first), width, dtype=dtype, device=tensors[0].device)
            units.diagonal(first).fill_(1.0)
            columns.append(projection.forward(units) - start)
    finally:
        for module in trained:
            module.training = True
    return torch.cat(columns).t()


def attention_implementation(model: nn.Module) -> str:
    """How a model computes attention, as ``set_attn_implementation`` takes it: transformers has no public getter."""
    return str(getattr(model.config, "_attn_implementation", "eager"))


def is_checkpointed(layer: nn.Module) -> bool:
    """Whether a layer is run again for its gradients, as ``gradient_checkpointing_enable`` asks for."""
    return layer.training and bool(getattr(layer, "gradient_checkpointing", False))


class _Around:
    """Stands in for what a layer calls to be run again: told of it with every call."""

    def __init__(self, checkpoint: Callable[..., Any], told: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint
        self.told = told

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.told(self.checkpoint, function, *args, **kwargs)


def stand_around_checkpointing(layer: nn.Module, told: Callable[..., Any]) -> None:
    """Let ``told(checkpoint, function, *args)`` do what a layer calls ``checkpoint(function, *args)`` for."""
    checkpoint = getattr(layer, _CHECKPOINT, None)
    if checkpoint is not None and not isinstance(checkpoint, _Around):
        setattr(layer, _CHECKPOINT, _Around(checkpoint, told))


def restore_checkpointing(layer: nn.Module) -> None:
    """Undo :func:`stand_around_checkpointing`."""
    checkpoint = getattr(layer, _CHECKPOINT, None)
    if isinstance(checkpoint, _Around):
        setattr(layer, _CHECKPOINT, checkpoint.checkpoint)


def in_backward() -> bool:
    """Whether gradients are being computed; False where torch does not say."""
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and task() != -1


def unfused_on_cpus(mask: Any) -> AbstractContextManager[object]:
    """Run flex attention on a CPU as it is written, not compiled, for a while.

    Its kernels for CPUs come in one length each where there is padding: a second one, which a probe is, gives code that
    does not compile in torch 2.13. Elsewhere nothing changes.

    Args:
        mask: what attention is given; flex attention gets a ``BlockMask``.
    """
    if isinstance(mask, (Tensor, type(None))) or torch.compiler.is_dynamo_compiling():
        return nullcontext()
    on_cpu = mask.kv_indices.device.type == "cpu"
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager") if on_cpu else nullcontext()
    return stance


def keep_addresses(matrices: Iterable[tuple[Tensor | None, ...]]) -> None:
    """Tell CUDA graphs that tensors stay where they are, so that none copies them: as transformers does for caches."""
    mark = getattr(torch._dynamo, "mark_static_address", None)
    for tensor in (one for matrix in matrices for one in matrix if one is not None):
        if mark is not None and tensor.device.type != "cpu":
            mark(tensor, guard=False)


@contextmanager
def parameters_without_memory() -> Iterator[None]:
    """Within this context modules are made whose parameters have no memory, and whose buffers are computed as ever.

    torch's ``meta`` device takes the buffers too, and nothing computes those again that no checkpoint has. What is
    replaced is where every module registers a parameter; accelerate's ``init_empty_weights`` does the same.
    """
    register = nn.Module.register_parameter

    def register_empty(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None and not param.is_meta:
            self._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@lru_cache(maxsize=1)
def _trim() -> Callable[[int], Any] | None:
    """The C library's ``malloc_trim``; None where it is not glibc."""
    return getattr(CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def give_memory_back() -> None:
    """Let the system have what is free.

    glibc keeps freed blocks below 32 MB for itself, and finds no use for the gaps when sizes differ from layer to
    layer: the process grows by what each layer has had. Elsewhere nothing happens.
    """
    if (trim := _trim()) is not None:
        trim(0)


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


def names_elsewhere(model: Any, keys: Iterable[str]) -> dict[str, list[list[str]]]:
    """Of each of a model's weights that transformers makes of a checkpoint's tensors under other names, these names.

    A tensor that is only renamed is alone. Experts that are put together have a list for each kind of matrix, one name
    an expert; with other operations they are left out. Without transformers' rules nothing is found.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            Concatenate,
            MergeModulelist,
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError:
        return {}
    rules = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [one for one in rules if isinstance(one, WeightRenaming)]
    converters = [one for one in rules if isinstance(one, WeightConverter)]
    rule_of = {pattern: one for one in converters for pattern in one.source_patterns}
    weights, found = dict(model.named_parameters()), dict[str, dict[str | None, list[str]]]()
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, weights)
        found.setdefault(name, {}).setdefault(pattern, []).append(key)

    def is_plain(pattern: str | None) -> bool:
        operations = [] if pattern is None else rule_of[pattern].operations
        steps = [(type(one), getattr(one, "dim", None)) for one in operations]
        return steps in ([], [(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])

    def in_order(kinds: Mapping[str | None, list[str]]) -> list[list[str]]:
        pattern = next(iter(kinds))
        return [*kinds.values()] if pattern is None else [kinds[one] for one in rule_of[pattern].source_patterns]

    plain = {name: kinds for name, kinds in found.items() if name in weights and all(map(is_plain, kinds))}
    return {name: in_order(kinds) for name, kinds in plain.items()}
