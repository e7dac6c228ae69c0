"""Batches carried through a model layer by layer: all of them through one layer before the next one is looked at."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pp_lightning.errors import UserError
from pp_lightning.families import BlockModules, layers_of
from pp_lightning.functional.probe import token_norms
from pp_lightning.interfaces import (
    argument_names,
    current_forward,
    first_argument,
    model_inputs,
    replace_forward,
    restore_forward,
    without_head,
)


class _EnoughError(Exception):
    """Ends a layer's run where what is wanted has been seen."""


@dataclass(frozen=True)
class _Call:
    """What a layer is called with beside hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class LayerByLayer:
    """Hidden states of a set of batches in front of one layer, and what every layer is called with for each.

    No layer runs while it is made, but for the first batch, which shows that each layer takes what the one in front of
    it gives.

    Args:
        model: in evaluation mode; its layers may become narrower while the batches are carried through it.
        batches: as :func:`~pp_lightning.calibrate` takes them.
        folder: keep hidden states in a file in there instead of in memory; None keeps them on the model's device.

    Attributes:
        layer: index of the layer in front of which the batches are.

    Raises:
        UserError: the layers are not called one after the other.
    """

    @torch.no_grad()
    def __init__(
        self, model: PreTrainedModel, batches: Sequence[Mapping[str, Any]], folder: Path | None = None
    ) -> None:
        self.layer = 0
        self._layers = layers_of(model)
        self._folder = folder
        self._hidden: list[Tensor] = []
        self._calls: list[list[_Call]] = []
        self._real = [None if (mask := batch.get("attention_mask")) is None else mask.bool() for batch in batches]
        wraps = _check_chain(model, batches[0])
        for batch in batches:
            calls: list[_Call] = []
            with _recorded(self._layers, calls, self._hidden, wraps):
                without_head(model)(**model_inputs(model, batch))
            self._calls.append(calls)
        if folder is not None:
            self._hidden = [_on_disk(hidden, folder / f"hidden-{i}.bin") for i, hidden in enumerate(self._hidden)]

    def __len__(self) -> int:
        """How many batches there are."""
        return len(self._hidden)

    @torch.no_grad()
    def advance(self) -> None:
        """Carry all batches through the layer as it is now."""
        layer = self._layers[self.layer]
        for number, hidden in enumerate(self._hidden):
            out = _first(self._run(layer, number))
            if self._folder is None:
                self._hidden[number] = out
            else:
                hidden.copy_(out)
        self.layer += 1

    @torch.no_grad()
    def states(self, modules: BlockModules) -> Iterator[Tensor]:
        """What enters a block's output projection in the layer, of each batch: the real tokens' states (N, C) float32.

        Each token's are divided by the norm of the residual in front of the layer, because every following block sees
        the residual through a norm: else the first tokens of a text, whose residuals can be a thousand times larger
        than others, would be all that counts.

        Args:
            modules: of a block of the layer in front of which the batches are. The rest of the layer does not run.
        """
        found: list[Tensor] = []

        def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found.append(inputs[0])
            raise _EnoughError

        hook = modules.projection(modules.output).register_forward_pre_hook(see)
        try:
            for number, real in enumerate(self._real):
                with suppress(_EnoughError):
                    self._run(self._layers[self.layer], number)
                states = found.pop().flatten(0, -2)
                norms = token_norms(self._hidden[number]).flatten()[:, None].to(states.device)
                wide = states if states.dtype == torch.float64 else states.float()
                relative = torch.where(norms > 0, wide / norms, 0.0)
                yield relative if real is None else relative[real.flatten().to(states.device)]
        finally:
            hook.remove()

    def _run(self, layer: nn.Module, number: int) -> Any:
        hidden, call = self._hidden[number], self._calls[number][self.layer]
        device = next(layer.parameters()).device
        return layer(hidden.to(device), *call.args, **call.kwargs)


@contextmanager
def _recorded(layers: Sequence[nn.Module], calls: list[_Call], firsts: list[Tensor], wraps: bool) -> Iterator[None]:
    """Let layers give back what they are given, and note what that is."""
    before = [current_forward(layer) for layer in layers]

    def noting(layer: nn.Module, first: bool) -> Any:
        name = argument_names(layer)[0]

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = first_argument(layer, args, kwargs)
            if first:
                firsts.append(hidden)
            calls.append(_Call(args[1:], {key: value for key, value in kwargs.items() if key != name}))
            return (hidden,) if wraps else hidden

        return forward

    try:
        for index, layer in enumerate(layers):
            replace_forward(layer, noting(layer, index == 0))
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            is_stock = getattr(forward, "__func__", None) is type(layer).forward
            restore_forward(layer, None if is_stock else forward)


def _check_chain(model: PreTrainedModel, batch: Mapping[str, Any]) -> bool:
    """Whether layers give tuples.

    Raises:
        UserError: a layer is called with something else than the one in front of it gave.
    """
    given: list[Tensor] = []
    wraps, hooks = [], []

    def enter(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given.append(first_argument(layer, args, kwargs).detach())

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        wraps.append(isinstance(output, tuple))
        given.append(_first(output).detach())

    for layer in layers_of(model):
        hooks += [layer.register_forward_pre_hook(enter, with_kwargs=True), layer.register_forward_hook(leave)]
    try:
        without_head(model)(**model_inputs(model, batch))
    finally:
        for hook in hooks:
            hook.remove()
    between = zip(given[1:-1:2], given[2::2], strict=True)
    if len(wraps) != len(layers_of(model)) or any(
        not torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in between
    ):
        raise UserError(
            f"{model.config.model_type} does more between its layers than to hand on hidden states: they cannot be "
            "carried through it layer by layer"
        )
    return wraps[0]


def _first(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _on_disk(tensor: Tensor, path: Path) -> Tensor:
    """The same numbers in a file that is mapped into memory."""
    file = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
    return file.copy_(tensor)
