"""One dense pass over a calibration set, seen through hooks on the unmodified model."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from pp_lightning.blocks import BlockKey
from pp_lightning.errors import UserError
from pp_lightning.families import BlockModules, blocks_of, layers_of
from pp_lightning.functional.compensation import channel_mean
from pp_lightning.functional.moments import Places, placed_count, placed_sum, sum_of_squares, sum_of_squares_about
from pp_lightning.functional.probe import token_norms
from pp_lightning.interfaces import INPUTS, argument_names, first_argument, model_inputs, without_head
from pp_lightning.progress import shown
from pp_lightning.pruned.check import Meeting, meetings
from pp_lightning.pruning import is_pruned
from pp_lightning.statistics import BlockSums, Statistics, fingerprint


@torch.inference_mode(False)  # what is kept is used outside, and changed in place there
@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    means: bool = True,
    layers: Sequence[int] | None = None,
    save_to: str | os.PathLike[str] | None = None,
    save_every: int = 10,
    progress: bool = True,
) -> Statistics:
    """Collect count, sum and sum of squares of every block's states by position and channel.

    Everything is summed in float32, squares a second time about a number near each channel's mean. Interrupted and
    called again with the same ``save_to`` and batches, it goes on where the file stands and ends with the same
    statistics, bit for bit; where batches are padded, on accelerators up to rounding: sums by position have no order
    there. Batches may end it by raising ``SystemExit``: the file then has all of those before.

    Args:
        model: a dense causal language model. It is run in evaluation mode and left as it was.
        batches: dictionaries with ``input_ids`` (B, S) and optionally ``attention_mask`` (B, S), 1 at real tokens, and
            ``position_ids`` (B or 1, S), where tokens are not at the positions that the mask gives them.
        means: collect sums and deviations from the mean beside sums of squares; FLAP needs them. Without them the
            statistics are a third as large.
        layers: only these layers; None takes all.
        save_to: a safetensors file to resume from, if it exists, and to write.
        save_every: batches between two writes of ``save_to``.
        progress: show a progress bar; lines where there is no terminal.

    Raises:
        UserError: no batches, something else in their place, one without a real token, activations that are not finite,
            a pruned or unknown model, layers that it has not, or a ``save_to`` that holds the statistics of another
            model, other batches or other layers, or no means.
    """
    _check_asked(model, batches)
    number = len(layers_of(model))
    wanted = range(number) if layers is None else layers
    _check_layers(wanted, number)
    statistics = _start(model, save_to)
    everything = blocks_of(model)
    blocks = {(index, block): modules for (index, block), modules in everything.items() if index in wanted}
    if statistics.num_batches and set(statistics.sums) != set(blocks):
        raise UserError(f"{save_to} covers other layers: name another file or remove it")
    has_means = any(sums.values is not None for sums in statistics.sums.values())
    if statistics.num_batches and means and not has_means:
        raise UserError(f"{save_to} was collected without means: name another file or remove it")
    collector = _Collector(statistics, means or has_means)
    done, digest, seen = statistics.num_batches, "", 0
    was_training = model.training
    model.eval()
    hooks: list[RemovableHandle] = []
    try:
        for batch in _saved_at_the_end(shown(batches, "calibrating", "batch", progress), statistics, save_to):
            seen += 1
            _check_batch(model, batch, seen)
            digest = _chained_digest(digest, batch)
            if seen < done:
                continue
            if seen == done:
                _check_same_batches(digest, statistics, save_to)
                continue
            hooks = hooks or collector.attach(blocks, meetings(model, everything))
            inputs = model_inputs(model, batch)
            collector.begin(inputs.get("attention_mask"), inputs.get("position_ids"))
            without_head(model)(**inputs)
            statistics.num_batches, statistics.batches_digest = seen, digest
            if save_to is not None and seen % save_every == 0:
                statistics.save(save_to)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    _check_complete(statistics, seen, done, save_to)
    if save_to is not None and seen > done:
        statistics.save(save_to)
    return statistics


def _saved_at_the_end(
    batches: Iterable[Mapping[str, Any]], statistics: Statistics, path: str | os.PathLike[str] | None
) -> Iterator[Mapping[str, Any]]:
    """The batches. Where the program is told to end between two of them, what it has so far is saved first."""
    try:
        yield from batches
    except SystemExit:  # of what gives the batches; inside of a batch, sums are not complete
        if path is not None and statistics.num_batches:
            statistics.save(path)
        raise


class _Collector:
    """Adds the states of each batch to the statistics."""

    def __init__(self, statistics: Statistics, means: bool) -> None:
        self.statistics = statistics
        self.means = means
        self.mask: Tensor | None = None
        self.position_ids: Tensor | None = None
        self.shape = torch.Size()
        self.places: Places | None = None

    def attach(self, blocks: Mapping[BlockKey, BlockModules], met: Mapping[BlockKey, Meeting]) -> list[RemovableHandle]:
        """Watch the first layer's input, the residual that enters each block, and the input of its output matrix."""
        first = next(iter(blocks.values())).layer
        hooks = [first.register_forward_pre_hook(self._count, with_kwargs=True)]
        for key, block in blocks.items():
            norm = met[key].norm
            meets = getattr(block.layer, norm) if norm is not None else block.owner
            hooks.append(meets.register_forward_pre_hook(partial(self._add_residual, key), with_kwargs=True))
            output = block.projection(block.output)
            hooks.append(output.register_forward_pre_hook(partial(self._add, key)))
        return hooks

    def begin(self, mask: Tensor | None, position_ids: Tensor | None) -> None:
        """Take a batch's attention mask (B, S) and position ids (B or 1, S).

        None where everything is real, and where positions follow from what is.
        """
        self.mask, self.position_ids = mask, position_ids

    def _count(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Find the real tokens of a batch and count them."""
        hidden, mask = first_argument(layer, args, kwargs), self.mask
        self.shape, device = hidden.shape[:2], hidden.device
        rows, tokens = self.shape
        padded = mask is not None and not bool(mask.all())
        if padded or self.position_ids is not None:
            real = hidden.new_ones(self.shape, dtype=torch.bool) if mask is None else mask.bool().to(device)
            given = self.position_ids
            positions = real.long().cumsum(1) - 1 if given is None else given.to(device).expand(self.shape)
            self.places = Places(positions, real, 1 + int(positions.masked_fill(~real, 0).max()))
            count = placed_count(self.places)
        else:
            self.places = None
            count = torch.full((tokens,), float(rows), dtype=torch.float32, device=device)
        statistics = self.statistics
        statistics.counts = _add_rows(statistics.counts.to(device), count)

    def _add(self, key: BlockKey, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        states = inputs[0].view(*self.shape, -1)  # OPT flattens rows and tokens in its MLP
        places, old = self._places_on(states.device), self.statistics.sums.get(key)
        squares = sum_of_squares(states) if places is None else placed_sum(states.float().square(), places)
        new = BlockSums(squares, None)
        if self.means:
            # The first batch's mean is near enough to that of all of them for deviations not to drown.
            shift = channel_mean(states, None if places is None else places.real) if old is None else old.shift
            assert shift is not None
            new.shift = shift = shift.to(states.device)
            if places is None:
                new.values = states.sum(0, dtype=torch.float32)
                new.spread = sum_of_squares_about(states, shift)
            else:
                new.values = placed_sum(states, places)
                new.spread = placed_sum((states.float() - shift).square(), places)
        self.statistics.sums[key] = new if old is None else _together(old, new)

    def _add_residual(self, key: BlockKey, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        states = first_argument(module, args, kwargs).view(*self.shape, -1)  # flat in OPT's MLP, see _add
        energy = token_norms(states).square()
        places = self._places_on(states.device)
        total = energy.sum(0) if places is None else placed_sum(energy[..., None], places).squeeze(1)
        old = self.statistics.residuals.get(key)
        self.statistics.residuals[key] = total if old is None else _add_rows(old.to(total.device), total)

    def _places_on(self, device: torch.device) -> Places | None:
        return None if self.places is None else self.places.to(device)


def _together(old: BlockSums, new: BlockSums) -> BlockSums:
    """Sums over both; those of the longer one are added to in place."""

    def added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
        return None if one is None or other is None else _add_rows(one.to(other.device), other)

    squares = _add_rows(old.squares.to(new.squares.device), new.squares)
    return BlockSums(squares, added(old.values, new.values), new.shift, added(old.spread, new.spread))


def _add_rows(total: Tensor, addend: Tensor) -> Tensor:
    """Sum of two tensors whose first dimension (positions) may differ; the longer one is added to in place."""
    if len(total) < len(addend):
        total, addend = addend, total
    total[: len(addend)] += addend
    return total


def _start(model: PreTrainedModel, save_to: str | os.PathLike[str] | None) -> Statistics:
    if save_to is None or not Path(save_to).exists():
        return Statistics(fingerprint(model))
    statistics = Statistics.load(save_to)
    statistics.check_model(model)
    return statistics


def _check_asked(model: PreTrainedModel, batches: object) -> None:
    if isinstance(batches, (str, bytes, Tensor, Mapping)):
        raise UserError(f"calibration batches are a list of dictionaries, not one {type(batches).__name__}")
    if is_pruned(model):
        raise UserError("calibrate runs the dense model: unprune_ it first")


def _check_layers(layers: Sequence[int], number: int) -> None:
    for layer in layers:
        if not 0 <= layer < number:
            raise UserError(f"layers names layer {layer}, but the model has layers 0 to {number - 1}")


def _check_batch(model: PreTrainedModel, batch: Any, number: int) -> None:
    """Refuse what is no batch, or has no real token, before the model runs."""
    name = model.main_input_name
    if not isinstance(batch, Mapping):
        raise UserError(f"calibration batches are dictionaries with {name}, not {type(batch).__name__}")
    if name not in batch:
        raise UserError(f"calibration batch {number} has no {name}")
    mask, position_ids = batch.get("attention_mask"), batch.get("position_ids")
    if mask is not None and not bool(mask.any()):
        raise UserError(f"calibration batch {number} is padding alone: leave it out")
    if position_ids is None:
        return
    if "position_ids" not in argument_names(without_head(model)):
        raise UserError(f"{model.config.model_type} takes no position_ids: leave them out of the calibration batches")
    rows, tokens = batch[name].shape[:2]
    if tuple(position_ids.shape) not in ((rows, tokens), (1, tokens)) or bool((position_ids < 0).any()):
        raise UserError(f"position_ids of calibration batch {number} are not one number from 0 a token")


def _chained_digest(previous: str, batch: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(previous.encode())
    for name in INPUTS:
        if name in batch:
            tensor = batch[name].cpu()
            tensor = tensor.float() if tensor.is_floating_point() else tensor.long()
            digest.update(str(tuple(tensor.shape)).encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def _check_same_batches(digest: str, statistics: Statistics, path: Any) -> None:
    if digest != statistics.batches_digest:
        raise UserError(f"{path} was collected from other batches: name another file or remove it")


def _check_complete(statistics: Statistics, seen: int, done: int, path: Any) -> None:
    if seen == 0:
        raise UserError("no calibration batches")
    if seen < done:
        raise UserError(f"{path} was collected from {done} batches, more than the {seen} given: remove it")
    for (layer, block), sums in statistics.sums.items():
        if not torch.isfinite(sums.squares).all():
            raise UserError(
                f"activations in the {block.value} block of layer {layer} are not finite: "
                "check the checkpoint, or use float32 or bfloat16"
            )
