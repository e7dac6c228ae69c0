"""Compile a model layer by layer, so that layers of one shape share one graph and depth costs nothing."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, PreTrainedModel

from pp_lightning.caches import cache_name
from pp_lightning.errors import UserError
from pp_lightning.families import layers_of, stack_of
from pp_lightning.functional.tracing import is_traced
from pp_lightning.interfaces import (
    compilations,
    dynamo_settings,
    is_checkpointed,
    is_wrapped,
    replace_forward,
    restore_forward,
    run_stock,
)
from pp_lightning.pruned.block import PrunedBlock
from pp_lightning.pruned.context import ModelContext
from pp_lightning.pruned.inputs import BatchInputs
from pp_lightning.pruning import COMPILED, is_pruned, pruning_of
from pp_lightning.shares import check_whole

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
    "specialize_float": True,  # epsilons and scales are those of all layers
    "force_parameter_static_shapes": False,  # layers of different widths share the graph with dynamic sizes
    "skip_nnmodule_hook_guards": False,  # pruned layers have hooks on their norms, others have not
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
        for one in compilations():
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
    shapes share one with dynamic sizes. Decoding a held choice stays eager, and so do prompts into a cache of fixed
    size; with such a cache ``generate`` compiles decoding as a whole.

    Args:
        model: a supported model. Prune it first: :func:`~pp_lightning.prune_` refuses a compiled one.
        mode: torch.compile's mode; ``reduce-overhead`` and ``max-autotune`` record CUDA graphs, of batches of the first
            size. Hidden states that a forward pass returns are then overwritten by the next one: copy what is to stay.
            Logits stay.

    Returns:
        A record that counts graphs and their seconds as they are made.

    Raises:
        UserError: the model is compiled already, or it is spread over devices.
    """
    if hasattr(model, COMPILED):
        raise UserError("the model is compiled already: uncompile_ it first")
    check_whole(model, "a compiled layer")
    if any(is_wrapped(module) for module in model.modules()):
        raise UserError(
            "graphs cannot hold what accelerate wraps around modules (device_map): load without it to compile"
        )
    compilation = Compilation(mode)
    if mode in RECORDING_MODES:
        compilation.step_hook = stack_of(model).register_forward_pre_hook(_begin_step)
    pruning = pruning_of(model) if is_pruned(model) else None
    context = None if pruning is None else pruning.context

    @cache
    def graphs_of(forward: Callable[..., Any], cache_name: str | None, pruned: bool) -> _TwoGraphs:
        return _TwoGraphs(_layer_function(forward, cache_name, pruned), mode, compilation)

    for index, layer in enumerate(layers_of(model)):
        blocks = [] if pruning is None else [block for (i, _), block in pruning.pruners.items() if i == index]
        stand_in = _CompiledLayer(layer, index, graphs_of, context if blocks else None, blocks)
        replace_forward(layer, stand_in.forward)
    if context is not None:
        context.overlaps = False
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
    for layer in layers_of(model):
        restore_forward(layer)
    if is_pruned(model) and (context := pruning_of(model).context) is not None:
        context.overlaps = True
    delattr(model, COMPILED)


def _begin_step(decoder: nn.Module, inputs: object) -> None:
    """Begin a forward pass of recorded graphs.

    Without a word from us, every call of a compiled function begins one, and may reuse the memory of what earlier calls
    returned. But here a layer's output is the next layer's input.
    """
    if not is_traced():  # a graph of the whole model is a step of its own
        torch.compiler.cudagraph_mark_step_begin()


class _TwoGraphs:
    """A function of a layer in two compilations: one for the first sizes it sees, one with dynamic sizes for the rest.

    Args:
        function: its first argument is the layer, the second the residual (B, S, D).
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
        self._first: dict[None, object] = {}

    def __call__(self, widths: tuple[int, ...], layer: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the function; ``widths`` tell layers apart that do not have the same shape."""
        sizes = (widths, hidden.shape)
        run = self._exact if self._first.setdefault(None, sizes) == sizes else self._dynamic  # one for all threads
        with dynamo_settings(**_DYNAMO):
            result = run(layer, hidden, *args, **kwargs)
        if sizes not in self._seen:
            self._seen.add(sizes)
            self._compilation.collect()
        return result

    def __deepcopy__(self, memo: dict[int, object]) -> "_TwoGraphs":
        """Copies of a model share the graphs."""
        return self


class _CompiledLayer:
    """Stands in for ``forward`` of a layer.

    A cache knows layers by number, which would make a graph for each of them. So the first tokens of a cache go through
    a graph that gives their keys and values back, and the cache gets them afterwards; with more tokens in it, the layer
    stays eager.

    Args:
        layer: stock, or with pruned blocks.
        index: its number.
        graphs_of: the compilations of a layer's function: see :func:`_layer_function`.
        context: of a layer with pruned blocks.
        blocks: these.
    """

    def __init__(
        self,
        layer: nn.Module,
        index: int,
        graphs_of: Callable[[Callable[..., Any], str | None, bool], "_TwoGraphs"],
        context: ModelContext | None,
        blocks: Sequence[PrunedBlock],
    ) -> None:
        self._layer = layer
        self._index = index
        self._graphs_of = graphs_of
        self._context = context
        self._blocks = list(blocks)
        self._function = _unwrapped(type(layer).forward)
        shapes = tuple(size for weight in layer.parameters() for size in weight.shape)
        self._widths = (*(block.runner.keep for block in blocks), *shapes)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer, in a graph where there is one for it."""
        context = self._context
        batch = None if context is None else context.batch
        name = cache_name(kwargs)
        cache = None if name is None else kwargs[name]
        stays_eager = is_traced() or (batch is not None and batch.decoding)
        stays_eager = stays_eager or (context is not None and is_checkpointed(self._layer))  # run again in no graph
        if stays_eager or (cache is not None and not self._begins(cache)):
            return run_stock(self._layer, hidden_states, *args, **kwargs)
        if name is not None:
            del kwargs[name]
        run = self._graphs_of(self._function, name, context is not None)
        if context is None or batch is None:
            result, *keys_and_values = run(self._widths, self._layer, hidden_states, args, kwargs)
        else:
            result, *keys_and_values = self._run_pruned(run, context, batch, hidden_states, args, kwargs)
        if cache is not None and keys_and_values:
            cache.update(*keys_and_values, self._index)
        return result

    def _run_pruned(
        self, run: "_TwoGraphs", context: ModelContext, batch: BatchInputs, hidden: Tensor, args: Any, kwargs: Any
    ) -> Any:
        """The layer in a graph, and around it what a graph cannot do: memory, and what is held for decoding."""
        plans = {block.block: block.plan(batch) for block in self._blocks}
        own = batch.of_layer(self._index, plans)
        with ExitStack() as locks:
            for block in self._blocks:
                locks.enter_context(block.runner.lock.taken())
            try:
                found = run(self._widths, self._layer, hidden, args, kwargs, context, own)
            finally:
                context.batch = batch
        batch.take_results(self._index, own)
        held = None if batch.conversation is None else batch.conversation.held
        for block in self._blocks:
            if held is not None and plans[block.block].leaves:
                choice = batch.results[block.key].choice
                held[block.number] = block.runner.slices.written(choice, batch.rooms[block.key])
        return found

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


def _layer_function(forward: Callable[..., Any], cache_name: str | None, pruned: bool) -> Callable[..., Any]:
    """A layer's ``forward`` as a function of tensors and constants: what is compiled.

    Args:
        forward: of the layer's class.
        cache_name: argument for the cache: keys and values are then given back too, and no cache is filled.
        pruned: whether it is told of the batch.
    """

    def run_layer(
        layer: nn.Module,
        hidden: Tensor,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        context: ModelContext | None = None,
        batch: BatchInputs | None = None,
    ) -> tuple[Any, ...]:
        if pruned and context is not None:
            context.batch = batch
        if cache_name is None:
            return (forward(layer, hidden, *args, **kwargs),)
        slot = _Slot()
        return forward(layer, hidden, *args, **{cache_name: slot}, **kwargs), *slot.seen

    return run_layer


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
