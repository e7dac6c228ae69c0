"""Batches carried through a model layer by layer: all of them through one layer before the next one is looked at."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pp_lightning.calls import Call, EnoughError, Record, gives_tuples, hidden_of, replaced
from pp_lightning.errors import UserError
from pp_lightning.families import BlockModules, layers_of
from pp_lightning.functional.probe import token_norms
from pp_lightning.hidden import HiddenStates
from pp_lightning.interfaces import first_argument, model_inputs, without_head
from pp_lightning.stored import resident


class LayerByLayer:
    """Hidden states of a set of batches in front of one layer, and what every layer is called with for each.

    No layer runs while it is made, but for the first batch and layer, which show what layers give. With a folder,
    hidden states are there, and an interrupted run that carried the same goes on at the layer that it had reached.

    Args:
        model: in evaluation mode; its layers may become narrower while the batches are carried through it. The weights
            of a layer that has them on disk are in memory while batches go through it.
        batches: as :func:`~pp_lightning.calibrate` takes them.
        folder: keep hidden states in files in there instead of in memory; None keeps them on the model's device.
        about: what tells these batches, and the model, from others; empty begins anew in any case.
    """

    @torch.no_grad()
    def __init__(
        self, model: PreTrainedModel, batches: Sequence[Mapping[str, Any]], folder: Path | None = None, about: str = ""
    ) -> None:
        self._layers = layers_of(model)
        self._calls: list[list[Call]] = []
        self._real = [None if (mask := batch.get("attention_mask")) is None else mask.bool() for batch in batches]
        self._hidden = HiddenStates(len(batches), folder, about)
        self._batches = batches
        self._wraps, self._forked = gives_tuples(model, batches[0]), 0
        self._begin = partial(self._record, model)
        self._begin(keep=self.layer == 0)

    def __len__(self) -> int:
        """How many batches there are."""
        return len(self._hidden)

    @property
    def layer(self) -> int:
        """Index of the layer in front of which the batches are."""
        return self._hidden.layer

    @property
    def chain(self) -> str:
        """What was said of the hidden states when they came to be in front of this layer."""
        return self._hidden.chain

    def restart(self) -> None:
        """Go back to the first layer."""
        self._begin(keep=True)

    def advance(self, chain: str = "") -> None:
        """Carry all batches through the layer as it is now."""
        for _ in self.watched():
            pass
        self.passed(chain)

    @torch.no_grad()
    def watched(self) -> Iterator[int]:
        """Run the layer on one batch after the other, for hooks on its modules, without going on behind it.

        Yields:
            The number of each batch before it is run, and of each copy.
        """
        layer = self._layers[self.layer]
        with resident(layer):
            for number in range(self._hidden.count):
                yield number
                self._hidden.put(number, hidden_of(self._run(layer, number)))

    def passed(self, chain: str = "") -> None:
        """Take what :meth:`watched` has seen coming out of the layer for what enters the next one."""
        self._hidden.turn(self.layer + 1, chain)
        self._forked = 0

    @torch.no_grad()
    def fork(self) -> None:
        """Run the batches through the layer as it is now, and carry what comes out as one more copy of them.

        For layers that do something else for a while: the copy goes on behind them, beside the batches, whose own way
        through the layer is still to come (:meth:`advance`). Copy c of batch b has the number ``c * len(self) + b``.
        """
        layer, first = self._layers[self.layer], self._hidden.count + self._forked
        with resident(layer):
            for number in range(len(self)):
                self._hidden.put(first + number, hidden_of(self._run(layer, number)))
        self._forked += len(self)

    @torch.no_grad()
    def advance_inside(self, model: PreTrainedModel) -> None:
        """Carry all batches through the layer, each in a call of the model in which all other layers stand still.

        For what stands around the layers, and sees that a batch begins and ends.
        """
        layer = self._layers[self.layer]
        others = [one for one in self._layers if one is not layer]

        def see(_: nn.Module, __: Any, output: Any) -> None:
            self._hidden.put(number, hidden_of(output))

        hook = layer.register_forward_hook(see)
        try:
            with resident(layer):
                for number in range(len(self)):
                    with replaced(others, partial(self._stand, number)):
                        without_head(model)(**model_inputs(model, self._batches[number]))
        finally:
            hook.remove()
        self.passed()

    @torch.no_grad()
    def output(self, model: PreTrainedModel, number: int, **more: Any) -> Any:
        """What the model makes of a batch's, or a copy's, hidden states behind the last layer.

        ``more`` is what the model is called with beside the batch, such as ``labels`` (B, S).
        """
        with replaced(self._layers, partial(self._stand, number)):
            return model(**model_inputs(model, self._batches[number % len(self)]), **more)

    def _stand(self, number: int, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What a layer gives that is not run: what it is given, the first one what the batches have come to."""
        hidden = self.hidden(number) if layer is self._layers[0] else first_argument(layer, args, kwargs)
        return (hidden,) if self._wraps else hidden

    def hidden(self, number: int) -> Tensor:
        """A batch's, or a copy's, hidden states in front of the layer, (B, S, D)."""
        return self._hidden.get(number)

    @torch.no_grad()
    def _record(self, model: PreTrainedModel, *, keep: bool) -> None:
        """Note what every layer is called with, and what enters the first one unless that is known."""
        self._calls.clear()
        for number, batch in enumerate(self._batches):
            record = Record(calls=[], checks=number == 0, wraps=self._wraps)
            with replaced(self._layers, record.note):
                without_head(model)(**model_inputs(model, batch))
            if not record.is_chain or len(record.calls) != len(self._layers):
                raise UserError(
                    f"{model.config.model_type} does more between its layers than to hand on hidden states: they "
                    "cannot be carried through it layer by layer"
                )
            self._calls.append(record.calls)
            if keep:
                assert record.entered is not None
                self._hidden.put(number, record.entered)
        if keep:
            self._hidden.turn(0, "")

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
            raise EnoughError

        hook = modules.projection(modules.output).register_forward_pre_hook(see)
        try:
            for number, real in enumerate(self._real):
                with suppress(EnoughError):
                    self._run(self._layers[self.layer], number)
                states = found.pop().flatten(0, -2)
                norms = token_norms(self.hidden(number)).flatten()[:, None].to(states.device)
                wide = states if states.dtype == torch.float64 else states.float()
                relative = torch.where(norms > 0, wide / norms, 0.0)
                yield relative if real is None else relative[real.flatten().to(states.device)]
        finally:
            hook.remove()

    def _run(self, layer: nn.Module, number: int) -> Any:
        hidden, call = self.hidden(number), self._calls[number % len(self)][self.layer]
        device = next(layer.parameters()).device
        return layer(hidden.to(device), *call.args, **call.kwargs)
