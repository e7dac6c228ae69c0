"""Gradient checkpointing runs a layer again while gradients are computed: on the choice of the first time."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pp_lightning.pruned.choice import Choice

_MOST = 256  # batches whose gradients may be outstanding


class Recomputing:
    """The choices of a block that may be asked for again, by what entered it.

    A layer that is run again must not choose anew: the history has moved, so that its gradients would be those of other
    units, without a word.
    """

    def __init__(self) -> None:
        self._choices: dict[tuple[float, ...], tuple[Choice, bool]] = {}
        self._met: tuple[float, ...] | None = None

    def known(self, hidden: Tensor, layer: nn.Module) -> tuple[Choice, bool] | None:
        """What :meth:`note` was told when ``hidden`` entered before; None the first time, and without checkpointing."""
        self._met = None
        if torch.compiler.is_compiling() or not (layer.training and getattr(layer, "gradient_checkpointing", False)):
            return None
        wide = hidden.detach().double()
        self._met = (wide.sum().item(), wide.square().sum().item(), *hidden.shape)
        return self._choices.get(self._met)

    def note(self, choice: Choice, shared: bool) -> None:
        """Remember the choice for what entered last, and whether probe and batch came from one projection."""
        if self._met is None:
            return
        self._choices[self._met] = choice, shared
        if len(self._choices) > _MOST:
            del self._choices[next(iter(self._choices))]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """No dropout inside: what a probe shows must not depend on chance, nor take random numbers from the batch."""
    if not module.training or torch.compiler.is_compiling():
        yield
        return
    trained = [one for one in module.modules() if one.training]
    for one in trained:
        one.training = False
    try:
        yield
    finally:
        for one in trained:
            one.training = True
