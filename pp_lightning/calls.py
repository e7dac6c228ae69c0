"""What the layers of a model are called with, seen while something else stands in for them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pp_lightning.families import layers_of
from pp_lightning.interfaces import (
    argument_names,
    current_forward,
    first_argument,
    model_inputs,
    replace_forward,
    restore_forward,
    without_head,
)


class EnoughError(Exception):
    """Ends a layer's run where what is wanted has been seen."""


@dataclass(frozen=True)
class Call:
    """What a layer is called with beside hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass
class Record:
    """What layers are called with, while they give back something else than they would compute.

    Attributes:
        calls: of every layer.
        checks: let each layer give random numbers, to see whether the next one is given just these.
        wraps: whether layers give tuples.
        entered: what the first layer is given.
        is_chain: whether each layer was given what the one in front of it gave.
        given: what the last layer gave.
    """

    calls: list[Call]
    checks: bool
    wraps: bool
    entered: Tensor | None = None
    is_chain: bool = True
    given: list[Tensor] = field(default_factory=list)

    def note(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What a layer gives back."""
        hidden, name = first_argument(layer, args, kwargs), argument_names(layer)[0]
        if self.entered is None:
            self.entered = hidden
        elif self.checks:
            self.is_chain = self.is_chain and torch.equal(hidden, self.given.pop())
        self.calls.append(Call(args[1:], {key: value for key, value in kwargs.items() if key != name}))
        out = hidden
        if self.checks:
            generator = torch.Generator().manual_seed(len(self.calls))
            out = torch.rand(hidden.shape, generator=generator).to(hidden)
            self.given.append(out)
        return (out,) if self.wraps else out


@contextmanager
def replaced(layers: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Within this context layers compute ``forward(layer, ...)``."""
    before = [current_forward(layer) for layer in layers]
    try:
        for layer in layers:
            replace_forward(layer, partial(forward, layer))
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            is_stock = getattr(own, "__func__", None) is type(layer).forward
            restore_forward(layer, None if is_stock else own)


def gives_tuples(model: PreTrainedModel, batch: Mapping[str, Any]) -> bool:
    """Whether layers give tuples: seen on the first one."""
    found: list[bool] = []

    def see(_: nn.Module, __: Any, output: Any) -> None:
        found.append(isinstance(output, tuple))
        raise EnoughError

    hook = layers_of(model)[0].register_forward_hook(see)
    try:
        with suppress(EnoughError):
            without_head(model)(**model_inputs(model, batch))
    finally:
        hook.remove()
    return found[0]


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a layer gives, (B, S, D)."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
