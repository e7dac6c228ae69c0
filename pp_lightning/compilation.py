"""Compile a model layer by layer, so that layers of one shape share one graph and depth costs nothing."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from types import FunctionType, MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._dynamo.utils import get_compilation_metrics
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, PreTrainedModel

from pp_lightning.architectures import architecture_of
from pp_lightning.errors import UserError
from pp_lightning.forwards import is_wrapped, replace_forward, restore_forward
from pp_lightning.pruned.batch import choose_ahead, run_batch, run_chosen
from pp_lightning.pruning import COMPILED, pruners_of

CompileMode = Literal["default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune"]

# Modes that record CUDA graphs, and the same without. A graph with dynamic sizes is compiled without: it would be
# recorded once more, for every layer, with each new size of a batch.
RECORDING_MODES: Mapping[CompileMode, CompileMode] = {
    "reduce-overhead": "default",
    "max-autotune": "max-autotune-no-cudagraphs",
}

# Graphs of one function. Beside sizes, what makes another one: a mask, its type, a cache, frozen histories, a probe of
# a single row or of few tokens.
_MOST_GRAPHS = 64

_DYNAMO = {
    "recompile_limit": _MOST_GRAPHS,
    "force_parameter_static_shapes": False,  # layers of different widths share the graph with dynamic sizes
    "skip_nnmodule_hook_guards": False,  # a layer has a hook where a parallel probe wants its residual
}

_numbers = itertools.count()


@dataclass(frozen=True)
class Graph:
    """One compilation.

    Attributes:
        seconds: how long it took.
        reason: why the graphs that were there already did not fit; None for the first of its kind.
    """

    seconds: float
    reason: str | None


class Compilation:
    """What :func:`compile_` did to a model.

    Args:
        mode: torch.compile's mode.

    Attributes:
        step_hook: tells CUDA graphs where a forward pass begins, in the modes that record them.
    """

    def __init__(self, mode: CompileMode) -> None:
        self.mode = mode
        self.step_hook: RemovableHandle | None = None
        self._names: set[str] = set()
        self._graphs: dict[tuple[str | None, str | None], Graph] = {}

    def watch(self, *functions: FunctionType) -> None:
        """Count what is compiled of these."""
        self._names |= {function.__code__.co_name for function in functions}

    def collect(self) -> None:
        """Note what has been compiled. To be called now and then: dynamo remembers the last 64 compilations only."""
        for one in get_compilation_metrics():
            if one.co_name in self._names and one.fail_type is None:
                seconds = float(one.entire_frame_compile_time_s or 0.0)
                self._graphs[one.co_name, one.compile_id] = Graph(seconds, one.recompile_reason)

    @property
    def graphs(self) -> list[Graph]:
        """All compilations so far, in order."""
        self.collect()
        return list(self._graphs.values())

    @property
    def seconds(self) -> float:
        """Time spent compiling so far."""
        return sum(graph.seconds for graph in self.graphs)

    def as_dict(self) -> dict[str, Any]:
        """Graphs, seconds, and the first line of each recompilation's reason."""
        graphs = self.graphs
        reasons = [graph.reason.splitlines()[0] for graph in graphs if graph.reason]
        return {"graphs": len(graphs), "seconds": self.seconds, "recompiled": reasons}


def compile_(model: PreTrainedModel, *, mode: CompileMode = "default") -> Compilation:
    """Compile every decoder layer of a model, dense or pruned by any method, in place.

    A dynamically pruned layer becomes one full graph: probe, scores, choice, slices, both blocks and the history's
    update; no graph break, no host synchronisation. The first shape of a batch gets a graph of its own, all other
    shapes share one with dynamic sizes. Decoding a held choice stays eager; where the cache has a fixed size,
    ``generate`` compiles it as a whole.

    Args:
        model: a supported model. Prune it first: :func:`~pp_lightning.prune_` refuses a compiled one.
        mode: torch.compile's mode; ``reduce-overhead`` and ``max-autotune`` record CUDA graphs, of batches of the first
            size. Hidden states that a forward pass returns are then overwritten by the next one: copy what is to stay.
            Logits stay.

    Returns:
        A record that counts graphs and their seconds as they are made.

    Raises:
        UserError: the model is compiled already, it is spread over devices, or its architecture is not supported.
    """
    if hasattr(model, COMPILED):
        raise UserError("the model is compiled already: uncompile_ it first")
    if any(is_wrapped(module) for module in model.modules()):
        raise UserError(
            "graphs cannot hold what accelerate wraps around modules (device_map): load without it to compile"
        )
    architecture, pruners = architecture_of(model.config), pruners_of(model)
    compilation = Compilation(mode)
    if mode in RECORDING_MODES:
        compilation.step_hook = architecture.decoder_of(model).register_forward_pre_hook(_begin_step)
    with_keys = cache(_returning_keys)  # one for each class of layers

    @cache
    def graphs_of(function: Callable[..., Any]) -> _TwoGraphs:
        return _TwoGraphs(function, mode, compilation)

    for index, layer in enumerate(architecture.layers_of(model)):
        pruner = pruners.get(index)
        if pruner is None:
            forward = _unwrapped(type(layer).forward)
            stock = _StockForward(graphs_of(forward), graphs_of(with_keys(forward)), _widths(layer), index)
            replace_forward(layer, MethodType(stock, layer))
            continue
        widths = (pruner.attention.keep, pruner.mlp.keep)
        pruner.run_batch = partial(graphs_of(run_batch), widths)
        pruner.choose_ahead = partial(graphs_of(choose_ahead), widths)
        pruner.run_chosen = partial(graphs_of(run_chosen), widths)
        pruner.context.overlaps = mode not in RECORDING_MODES
    setattr(model, COMPILED, compilation)
    return compilation


def uncompile_(model: PreTrainedModel) -> None:
    """Undo :func:`compile_`.

    Raises:
        UserError: the model is not compiled.
    """
    if not hasattr(model, COMPILED):
        raise UserError("the model is not compiled: compile_ it first")
    compilation: Compilation = getattr(model, COMPILED)
    if compilation.step_hook is not None:
        compilation.step_hook.remove()
    pruners = pruners_of(model)
    for index, layer in enumerate(architecture_of(model.config).layers_of(model)):
        if index in pruners:
            pruner = pruners[index]
            pruner.run_batch, pruner.choose_ahead, pruner.run_chosen = run_batch, choose_ahead, run_chosen
            pruner.context.overlaps = True
        else:
            restore_forward(layer)
    delattr(model, COMPILED)


def _begin_step(decoder: nn.Module, inputs: object) -> None:
    """Begin a forward pass of recorded graphs.

    Without a word from us, every call of a compiled function begins one, and may reuse the memory of what earlier calls
    returned. But here a layer's output is the next layer's input.
    """
    if not torch.compiler.is_compiling():  # a graph of the whole model is a step of its own
        torch.compiler.cudagraph_mark_step_begin()


class _TwoGraphs:
    """A function of a layer in two compilations: one for the first sizes it sees, one with dynamic sizes for the rest.

    Args:
        function: its first argument is the layer, its pruner or a block, the second the residual (B, S, D).
        mode: torch.compile's mode.
        compilation: told of the code objects that are compiled.
    """

    def __init__(self, function: Callable[..., Any], mode: CompileMode, compilation: Compilation) -> None:
        exact, dynamic = with_own_code(function), with_own_code(function)
        compilation.watch(exact, dynamic)
        self._exact = torch.compile(exact, fullgraph=True, dynamic=False, mode=torch_mode(mode))
        unrecorded = RECORDING_MODES.get(mode, mode)
        self._dynamic = torch.compile(dynamic, fullgraph=True, dynamic=True, mode=torch_mode(unrecorded))
        self._compilation = compilation
        self._seen: set[object] = set()
        self._first: object = None

    def __call__(self, widths: tuple[int, ...], layer: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the function; ``widths`` tell layers apart that do not have the same shape."""
        sizes = (widths, hidden.shape)
        self._first = self._first or sizes
        run = self._exact if sizes == self._first else self._dynamic
        with torch._dynamo.config.patch(_DYNAMO):
            result = run(layer, hidden, *args, **kwargs)
        if sizes not in self._seen:
            self._seen.add(sizes)
            self._compilation.collect()
        return result

    def __deepcopy__(self, memo: dict[int, object]) -> "_TwoGraphs":
        """Copies of a model share the graphs."""
        return self


class _StockForward:
    """Stands in for ``forward`` of a stock layer.

    A cache knows layers by number, which would make a graph for each of them. So the first tokens of a cache go through
    a graph that gives their keys and values back, and the cache gets them afterwards; with more tokens in it, the layer
    stays eager.

    Args:
        alone: the forward without a cache.
        first: :func:`_returning_keys` of it.
        widths: of the layer.
        index: of the layer.
    """

    def __init__(self, alone: "_TwoGraphs", first: "_TwoGraphs", widths: tuple[int, ...], index: int) -> None:
        self._alone = alone
        self._first = first
        self._widths = widths
        self._index = index

    def __call__(
        self, layer: nn.Module, hidden_states: Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any
    ) -> Any:
        if past_key_values is None:
            return self._alone(self._widths, layer, hidden_states, *args, **kwargs)
        if torch.compiler.is_compiling() or not self._begins(past_key_values):
            forward = type(layer).forward
            return forward(layer, hidden_states, *args, past_key_values=past_key_values, **kwargs)
        result, keys, values = self._first(self._widths, layer, hidden_states, *args, **kwargs)
        past_key_values.update(keys, values, self._index)
        return result

    def _begins(self, cache: Any) -> bool:
        """Whether the cache will hold these tokens and no others, and gives them back as they are."""
        return type(cache) is DynamicCache and cache.get_seq_length(self._index) == 0


class _Slot:
    """Takes the keys and values of one layer where a cache is expected."""

    is_compileable = False

    def __init__(self) -> None:
        self.seen: tuple[Tensor, ...] = ()

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Nothing came before: these are all."""
        self.seen = (keys, values)
        return keys, values


def _returning_keys(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's ``forward`` that fills no cache, but gives its keys and values back too."""

    def with_keys(layer: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        slot = _Slot()
        return forward(layer, hidden_states, *args, past_key_values=slot, **kwargs), *slot.seen

    return with_keys


def _widths(layer: nn.Module) -> tuple[int, ...]:
    return tuple(size for weight in layer.parameters() for size in weight.shape)


def with_own_code(function: Callable[..., Any]) -> FunctionType:
    """A copy of a function with a code object of its own.

    Dynamo keeps graphs with the code object: with the original one, all models of a process would share them, and their
    number is limited.
    """
    function = _unwrapped(function)
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    copy = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def torch_mode(mode: CompileMode) -> str | None:
    """What torch.compile calls a mode."""
    return None if mode == "default" else mode


def _unwrapped(function: Callable[..., Any]) -> FunctionType:
    while hasattr(function, "__wrapped__"):  # transformers wraps a layer's forward for gradient checkpointing
        function = function.__wrapped__
    assert isinstance(function, FunctionType)
    return function
