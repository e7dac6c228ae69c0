"""Gradient checkpointing runs a layer again while gradients are computed: on the choices of the first time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from pp_lightning.blocks import Block
from pp_lightning.errors import UserError
from pp_lightning.interfaces import in_backward, is_checkpointed, restore_checkpointing, stand_around_checkpointing
from pp_lightning.pruned.choice import Choice


class Known(NamedTuple):
    """How a block ran the first time.

    Attributes:
        choice: what it ran on.
        shares: whether probe and batch came from one projection: gradients need the same operations again.
    """

    choice: Choice
    shares: bool


@dataclass
class Pass:
    """One pass of a batch through a layer. It lives as long as the graph that gradients are computed from."""

    begun: bool = False
    known: dict[Block, Known] = field(default_factory=dict)


class Recomputing:
    """What one layer's blocks run on, for the passes that are run again.

    A layer that is run again must not choose anew: the history has moved, so that its gradients would be those of other
    units, without a word.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._layer = (layer,)
        self._current: Pass | None = None
        self._again = False

    def attach(self) -> None:
        """Before a batch: stand around what runs the layer again, if anything does."""
        layer = self._layer[0]
        if is_checkpointed(layer):
            stand_around_checkpointing(layer, self.run)

    def detach(self) -> None:
        """Undo :meth:`attach`."""
        restore_checkpointing(self._layer[0])

    def run(self, checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``checkpoint(function, ...)``, which runs ``function`` now and again for its gradients."""
        return checkpoint(partial(self._run_pass, Pass(), function), *args, **kwargs)

    def _run_pass(self, one: Pass, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._current, self._again = one, one.begun
        one.begun = True
        try:
            return function(*args, **kwargs)
        finally:
            self._current, self._again = None, False

    def known(self, block: Block) -> Known | None:
        """How a block ran when this pass was run first; None the first time, and without checkpointing.

        Raises:
            UserError: the layer is run again by other means than transformers' checkpointing.
        """
        if torch.compiler.is_dynamo_compiling():
            return None
        if self._current is None:
            if in_backward():
                raise UserError(
                    "a pruned layer is run again for its gradients, and would choose anew: turn checkpointing on with "
                    "model.gradient_checkpointing_enable()"
                )
            return None
        return self._current.known.get(block) if self._again else None

    def note(self, block: Block, known: Known) -> None:
        """Remember how a block runs this pass."""
        if not torch.compiler.is_dynamo_compiling() and self._current is not None:
            self._current.known[block] = known


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """No dropout inside: what a probe shows must not depend on chance, nor take random numbers from the batch."""
    if not module.training or torch.compiler.is_dynamo_compiling():
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
