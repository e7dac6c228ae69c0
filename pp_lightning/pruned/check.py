"""What the layers of a model meet, and whether slicing their blocks equals silencing the units that go.

Seen on a few tokens, in the first layer of each kind. A wrong model is never produced: what does not agree is refused.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pp_lightning.blocks import AttentionUnit, Block, BlockKey, ModelShape, units_of
from pp_lightning.caches import without_cache
from pp_lightning.errors import UserError
from pp_lightning.families import BlockModules, layers_config, layers_of, random_inputs
from pp_lightning.functional.probe import Arguments
from pp_lightning.interfaces import argument_names, without_head
from pp_lightning.pruned.choice import Choice
from pp_lightning.pruned.runner import BlockRunner

_ROWS, _TOKENS = 2, 12
_HALF = (torch.float16, torch.bfloat16)


@dataclass
class Meeting:
    """What a block meets in a batch.

    Attributes:
        hidden: what enters it, (B, S, D) or (B * S, D).
        given: the other arguments of its module.
        norm: name of the layer's norm that ``hidden`` comes from; None where the residual itself enters.
    """

    hidden: Tensor
    given: Arguments
    norm: str | None


class _EnoughError(Exception):
    """The last layer of interest has been run."""


@torch.no_grad()
def meetings(model: PreTrainedModel, blocks: Mapping[BlockKey, BlockModules]) -> dict[BlockKey, Meeting]:
    """What each block of the first layer of each kind meets, by layer and block.

    Args:
        model: dense.
        blocks: all blocks of all layers.
    """
    seen: dict[BlockKey, Meeting] = {}
    firsts = kinds_of(model)
    layers = layers_of(model)
    hooks = []
    for index in set(firsts.values()):
        made: dict[int, tuple[str, Tensor]] = {}  # the tensors too: their numbers would be given anew
        for name, child in layers[index].named_children():
            hooks.append(child.register_forward_hook(partial(_note_output, made, name)))
        for block in Block:
            modules = blocks.get((index, block))
            if modules is not None:
                entrance = modules.projection(next(iter(modules.inputs))) if modules.is_bare else modules.module
                note = partial(_note_inputs, seen, (index, block), made, argument_names(entrance))
                hooks.append(entrance.register_forward_pre_hook(note, with_kwargs=True))
    hooks.append(layers[max(firsts.values())].register_forward_hook(_stop))
    was_training = model.training
    model.eval()
    try:
        with suppress(_EnoughError):
            without_head(model)(**random_inputs(model, _ROWS, _TOKENS))
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    return {(i, block): seen[firsts[i], block] for i, block in blocks if (firsts[i], block) in seen}


def _switches(layer: nn.Module) -> tuple[tuple[str, str, bool], ...]:
    """Plain flags of a layer's modules: the same class may compute different things by them."""
    flags = ((path, vars(module)) for path, module in layer.named_modules())
    return tuple((path, name, own[name]) for path, own in flags for name in own if type(own[name]) is bool)


def kinds_of(model: PreTrainedModel) -> dict[int, int]:
    """For each layer the first one that is built like it."""
    types = getattr(layers_config(model), "layer_types", None)
    firsts: dict[object, int] = {}
    found = {}
    for index, layer in enumerate(layers_of(model)):
        shapes = tuple((name, tuple(weight.shape)) for name, weight in layer.named_parameters())
        kind = (
            type(layer),
            shapes,
            _switches(layer),
            types[index] if types is not None and index < len(types) else None,
        )
        found[index] = firsts.setdefault(kind, index)
    return found


@torch.no_grad()
def check_block(modules: BlockModules, shape: ModelShape, unit: AttentionUnit, met: Meeting) -> None:
    """Run a block on one half of its units and on the other one, and whole with the others silenced.

    Both halves: code that takes the first of something for each unit is right on the half that has the first units.

    Raises:
        UserError: the two differ, or the block cannot be run on half of its units.
    """
    number = units_of(shape, modules.block, unit).number
    half = number // 2
    if half == 0:
        return
    runner = BlockRunner(modules, shape, unit, half)
    mixed = torch.randperm(number, generator=torch.Generator().manual_seed(0))
    try:
        with _installed(runner):
            halves = mixed[:half].sort().values, mixed[-half:].sort().values
            same = all(_agrees(runner, kept, met) for kept in halves)
    except Exception as error:  # whatever stock code raises on fewer heads than it expects
        reason = shorten(str(error), 80, placeholder=" ...") or type(error).__name__
        raise UserError(f"its code does not run on fewer units ({reason})") from error
    if not same:
        raise UserError("its code does not compute the same on fewer units")


def _agrees(runner: BlockRunner, kept: Tensor, met: Meeting) -> bool:
    choice = Choice(kept.to(met.hidden.device))
    sliced = runner.run(met.hidden, met.given, runner.narrowed(choice, runner.slices.of(choice)), choice.kept)
    masked = runner.run(met.hidden, met.given, runner.widened(partial(runner.silenced, choice.kept)))
    return _agree(_first(sliced), _first(masked))


@contextmanager
def _installed(runner: BlockRunner) -> Iterator[None]:
    was_training = runner.module.training
    runner.install(None, None, None)
    runner.module.eval()
    try:
        yield
    finally:
        runner.module.train(was_training)
        runner.remove()


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _agree(sliced: Tensor, masked: Tensor) -> bool:
    wide, expected = sliced.float(), masked.float()
    if wide.shape != expected.shape:
        return False
    allowed = 0.05 if sliced.dtype in _HALF else 1e-3
    return bool((wide - expected).norm() <= allowed * expected.norm() + 1e-30)


def _note_output(made: dict[int, tuple[str, Tensor]], name: str, module: nn.Module, inputs: Any, output: Any) -> None:
    if isinstance(output, Tensor):
        made[id(output)] = (name, output)


def _note_inputs(
    seen: dict[BlockKey, Meeting],
    key: BlockKey,
    made: Mapping[int, tuple[str, Tensor]],
    names: tuple[str, ...],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> None:
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    hidden = given.pop(names[0])
    seen[key] = Meeting(hidden, without_cache(given), made[id(hidden)][0] if id(hidden) in made else None)


def _stop(*_: object) -> None:
    raise _EnoughError
