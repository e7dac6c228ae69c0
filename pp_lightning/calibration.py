"""One dense pass over a calibration set, seen through hooks on the unmodified model."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from pp_lightning.blocks import BlockKey
from pp_lightning.collecting import Collector
from pp_lightning.errors import UserError
from pp_lightning.families import BlockModules, blocks_of, layers_of
from pp_lightning.interfaces import INPUTS, argument_names, model_inputs, without_head
from pp_lightning.layerwise import LayerByLayer
from pp_lightning.progress import shown
from pp_lightning.pruned.check import meetings
from pp_lightning.pruning import is_pruned
from pp_lightning.shares import own_share
from pp_lightning.statistics import Statistics, fingerprint
from pp_lightning.stored import is_settled, values_of


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
    folder: str | os.PathLike[str] | None = None,
) -> Statistics:
    """Collect count, sum and sum of squares of every block's states by position and channel.

    Everything is summed in float32, squares a second time about a number near each channel's mean. Interrupted and
    called again with the same ``save_to`` and batches, it goes on where the file stands and ends with the same
    statistics, bit for bit; where batches are padded, on accelerators up to rounding: sums by position have no order
    there. Batches may end it by raising ``SystemExit``: the file then has all of those before.

    Args:
        model: a dense causal language model. It is run in evaluation mode and left as it was. Where transformers has
            spread it over processes (``tp_plan``), each of them must call this, and has statistics of its own units.
        batches: dictionaries with ``input_ids`` (B, S) and optionally ``attention_mask`` (B, S), 1 at real tokens, and
            ``position_ids`` (B or 1, S), where tokens are not at the positions that the mask gives them.
        means: collect sums and deviations from the mean beside sums of squares; FLAP needs them. Without them the
            statistics are a third as large.
        layers: only these layers; None takes all.
        save_to: a safetensors file to resume from, if it exists, and to write.
        save_every: batches between two writes of ``save_to``.
        progress: show a progress bar; lines where there is no terminal.
        folder: of a model whose weights stay on disk: all batches go through one layer after the other, with hidden
            states and the sums of finished layers in this folder, where an interrupted run goes on. None keeps them in
            memory.

    Raises:
        UserError: no batches, something else in their place, one without a real token, activations that are not finite,
            a pruned or unknown model, layers that it has not, or a ``save_to`` that holds the statistics of another
            model, other batches or other layers, or no means.
    """
    _check_asked(model, batches)
    with own_share(model):
        return _calibrated(model, batches, means, layers, save_to, save_every, progress, folder)


def _calibrated(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    means: bool,
    layers: Sequence[int] | None,
    save_to: str | os.PathLike[str] | None,
    save_every: int,
    progress: bool,
    folder: str | os.PathLike[str] | None,
) -> Statistics:
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
    collector = Collector(statistics, means or has_means)
    if is_settled(layers_of(model)[0]):
        known = None if folder is None else Path(folder)
        return _layer_by_layer(model, list(batches), collector, blocks, known, save_to, progress)
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
            collector.begin(inputs.get("attention_mask"), inputs.get("position_ids"), counts=True)
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


def _layer_by_layer(
    model: PreTrainedModel,
    batches: Sequence[Mapping[str, Any]],
    collector: Collector,
    blocks: Mapping[BlockKey, BlockModules],
    folder: Path | None,
    save_to: str | os.PathLike[str] | None,
    progress: bool,
) -> Statistics:
    """The same sums with all batches through one layer after the other; a batch's come in the same order."""
    statistics, digest = collector.statistics, ""
    if statistics.num_batches == 0:
        for number, batch in enumerate(batches, 1):
            _check_batch(model, batch, number)
            digest = _chained_digest(digest, batch)
        if not batches:
            raise UserError("no calibration batches")
        about = f"{statistics.model} {digest} {collector.means} {sorted(blocks)}"
        carried = LayerByLayer(model, batches, folder, hashlib.sha256(about.encode()).hexdigest())
        _collect(model, batches, collector, blocks, carried, folder, progress)
        statistics.num_batches, statistics.batches_digest = len(batches), digest
        _check_complete(statistics, len(batches), 0, save_to)
        if save_to is not None:
            statistics.save(save_to)
    return statistics


def _collect(
    model: PreTrainedModel,
    batches: Sequence[Mapping[str, Any]],
    collector: Collector,
    blocks: Mapping[BlockKey, BlockModules],
    carried: LayerByLayer,
    folder: Path | None,
    progress: bool,
) -> None:
    statistics = collector.statistics
    files = {i: None if folder is None else folder / f"sums-{i}.safetensors" for i in sorted({i for i, _ in blocks})}
    for index in range(carried.layer):
        file = files.get(index)
        if file is not None and file.exists():
            statistics.find(index, file)
        elif index in files:
            carried.restart()
    met = meetings(model, blocks_of(model))
    for index in shown(range(carried.layer, max(files) + 1), "calibrating", "layer", progress):
        own = {key: modules for key, modules in blocks.items() if key[0] == index}
        hooks = collector.attach(own, met) if own else []
        try:
            for number in carried.watched():
                inputs = model_inputs(model, batches[number])
                mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
                collector.begin(mask, positions, counts=index == min(files))
        finally:
            for hook in hooks:
                hook.remove()
        file = files.get(index)
        if file is not None:
            statistics.leave(index, file, "")
        carried.passed()


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
        if not torch.isfinite(values_of(sums.squares)).all():
            raise UserError(
                f"activations in the {block.value} block of layer {layer} are not finite: "
                "check the checkpoint, or use float32 or bfloat16"
            )
