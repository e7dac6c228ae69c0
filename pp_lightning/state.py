"""What a dynamically pruned model remembers from batch to batch: to keep, to compare, to put back."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pp_lightning.errors import UserError
from pp_lightning.pruning import is_pruned, pruning_of

_BATCHES = "batches"


def pruning_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Everything that a later batch's choice depends on and an earlier one moved, on the CPU.

    ``history.3.mlp`` (P_max, C) float32 and ``mean.3.mlp`` (C,) float32 of each block that keeps them, and ``batches``,
    an int64 scalar, which random samples are drawn by. Plain tensors: safetensors takes them. Empty for dense and
    statically pruned models, which remember nothing.
    """
    found = {name: tensor.detach().to("cpu", copy=True) for name, tensor in _tensors(model).items()}
    if is_pruned(model) and (context := pruning_of(model).context) is not None:
        found[_BATCHES] = torch.tensor(context.num_batches)
    return found


@torch.no_grad()
def load_pruning_state(model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Let a model remember what another one, pruned in the same way, or itself did when ``state`` was taken.

    Args:
        model: where it is put; nothing is, unless all of it fits.
        state: from :func:`pruning_state`.

    Raises:
        UserError: it is of a model of other sizes, or of another method.
    """
    own = {name: tensor.shape for name, tensor in _tensors(model).items()}
    context = pruning_of(model).context if is_pruned(model) else None
    given = {name: tensor.shape for name, tensor in state.items()}
    if context is not None:
        own[_BATCHES] = torch.Size()
    wrong = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
    if wrong:
        raise UserError(
            f"this state is of another model or method: {wrong[0]} does not fit, prune with the same settings"
        )
    if context is not None:
        context.load({name: tensor for name, tensor in state.items() if name != _BATCHES}, int(state[_BATCHES]))


def skipped_batches(model: PreTrainedModel) -> int:
    """How many batches were not finite, and moved nothing. Waits for the device, and warns once."""
    context = pruning_of(model).context if is_pruned(model) else None
    return 0 if context is None else context.skipped.number


@contextmanager
def kept_state(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """Within this context batches move the state; afterwards it is what it was, which the context gives."""
    before = pruning_state(model)
    try:
        yield before
    finally:
        load_pruning_state(model, before)


def digest_of(state: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of a state; models calibrated on different text differ in it."""
    total = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        total.update(name.encode())
        total.update(tensor.numpy().tobytes())
    return total.hexdigest()


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    context = pruning_of(model).context if is_pruned(model) else None
    return {} if context is None else context.tensors()
