"""What pruning does to a model: the blocks that choose, or slices in the place of projections, and a record of it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from pp_lightning.blocks import Block, BlockKey, BlockPlan, ModelShape
from pp_lightning.calibration_data import CalibrationData
from pp_lightning.errors import UserError
from pp_lightning.families import BlockModules, OutputWeights, blocks_of, layers_of, stack_of
from pp_lightning.interfaces import argument_names
from pp_lightning.methods.base import BlockToPrune, PruningMethod, StaticMethod
from pp_lightning.methods.dynamic import DynamicMethod
from pp_lightning.plan import Plan
from pp_lightning.pruned.block import PrunedBlock
from pp_lightning.pruned.check import Meeting
from pp_lightning.pruned.context import ModelContext
from pp_lightning.pruned.conversations import HeldSlices
from pp_lightning.pruned.random_samples import RandomSamples
from pp_lightning.pruned.recomputing import Recomputing
from pp_lightning.pruned.runner import BlockRunner
from pp_lightning.pruned.static import SlicedBlock, check_sliceable, restore_block, slice_block
from pp_lightning.pruned.turns import Turns
from pp_lightning.statistics import Statistics
from pp_lightning.stored import is_settled
from pp_lightning.updating import LeastSquares, UpdatedBlock, Updating


@dataclass
class Pruning:
    """What :func:`prune_` did to a model: enough to report it and to undo it.

    Attributes:
        plan: layers and uniform counts.
        keep: units that stay, for every pruned block (FLAP's differ from layer to layer).
        context: shared by the blocks of a dynamically pruned model; None for a static method.
        pruners: the blocks that choose, of a dynamic method.
        choices: the units of a static method, and of blocks that keep all.
        biases: what it added to the outputs of its blocks, where anything.
        columns: the output matrices (D, K * c) that it changed, where any, and they are in memory.
        updated: what came of each block's update, where there was one.
        path: of a search for counts, if there was one.
        places: the folder of pruned layers that stay on disk, where it goes with the model.
    """

    method: PruningMethod
    plan: Plan
    keep: dict[BlockKey, int]
    shape: ModelShape
    context: ModelContext | None = None
    pruners: dict[BlockKey, PrunedBlock] = field(default_factory=dict)
    choices: dict[BlockKey, Tensor] = field(default_factory=dict)
    biases: dict[BlockKey, Tensor] = field(default_factory=dict)
    columns: dict[BlockKey, Tensor] = field(default_factory=dict)
    path: list[dict[str, Any]] = field(default_factory=list)
    updated: dict[BlockKey, UpdatedBlock] = field(default_factory=dict)
    places: TemporaryDirectory[str] | None = None
    _sliced: dict[BlockKey, SlicedBlock] = field(default_factory=dict)
    _hooks: list[RemovableHandle] = field(default_factory=list)
    _can_undo: bool = True
    _attention: str | None = None


@dataclass(frozen=True)
class Surgery:
    """A model that is to be pruned, and what is known of it."""

    model: PreTrainedModel
    blocks: Mapping[BlockKey, BlockModules]
    shape: ModelShape
    plan: Plan
    keep: dict[BlockKey, int]
    met: Mapping[BlockKey, Meeting]
    over: Callable[[Tensor], Tensor] | None = None

    def whole(self) -> dict[BlockKey, Tensor]:
        """The blocks of pruned layers that keep all units, and these."""
        numbers = {block.block: block.units.number for block in self.plan.blocks}
        return {key: torch.arange(number) for key, number in self.keep.items() if number == numbers[key[1]]}


class Serving(NamedTuple):
    """How conversations are served: see :func:`prune_`."""

    held: HeldSlices
    dense_below: float
    refresh: int | None
    dense_rows: int


def prune_dynamic(
    surgery: Surgery, method: DynamicMethod, stats: Statistics | None, release: bool, serving: Serving
) -> Pruning:
    """Let blocks choose for every batch; with ``release``, statistics are emptied into their histories."""
    model, plan = surgery.model, surgery.plan
    histories = stats if method.keeps_history else None
    stack, layers = stack_of(model), layers_of(model)
    context = ModelContext(
        None if histories is None else histories.num_positions,
        argument_names(stack),
        argument_names(layers[0]),
        bool(getattr(model.config, "use_cache", False)),
        *serving,
        RandomSamples(method, len(layers)),
    )
    whole = surgery.whole()
    keys = [key for key in surgery.keep if key not in whole]
    recomputing = {index: Recomputing(layers[index]) for index, _ in keys}
    pruners = {  # all of them before the first is installed: a mistake leaves the model as it was
        key: _pruned_block(surgery, key, number, method, context, recomputing[key[0]], histories, release)
        for number, key in enumerate(keys)
    }
    context.held.check([block.runner.slices for block in pruners.values()])
    hooks = []
    for block in pruners.values():
        block.runner.module.pruner = block
        block.runner.install(block.forward, block.begin, block.end)
        if block.norm is not None:
            hooks.append(block.norm.register_forward_pre_hook(block.see_residual))
    context.blocks = list(pruners.values())
    context.digest()
    hooks += [
        stack.register_forward_pre_hook(context.begin_batch, with_kwargs=True),
        layers[0].register_forward_pre_hook(context.enter_layers, with_kwargs=True),
        stack.register_forward_hook(context.end_batch, with_kwargs=True),
    ]
    if method.probe_source == "previous":
        hooks += _publish_residuals(surgery, context)
    pruning = Pruning(method, plan, surgery.keep, surgery.shape, context, pruners, choices=whole, _hooks=hooks)
    if method.weighs_tokens:
        pruning._attention = model.config._attn_implementation
        model.set_attn_implementation("eager")
        owners = (block.module for (_, name), block in surgery.blocks.items() if name is Block.ATTENTION)
        hooks += [owner.register_forward_hook(context.see_attention) for owner in owners]
    return pruning


def _publish_residuals(surgery: Surgery, context: ModelContext) -> list[RemovableHandle]:
    """Let parallel probing see the residuals that enter pruned layers, and those between blocks."""
    layers, hooks = layers_of(surgery.model), []
    for index in surgery.plan.layers:
        hooks.append(layers[index].register_forward_pre_hook(context.enter_layer, with_kwargs=True))
    for index in {i for i in surgery.plan.layers} | {i - 1 for i in surgery.plan.layers if i > 0}:
        block = surgery.blocks.get((index, Block.MLP))
        if block is not None:
            norm = surgery.met[index, Block.MLP].norm
            meets = block.module if norm is None else getattr(layers[index], norm)
            hooks.append(meets.register_forward_pre_hook(context.between_blocks))
    return hooks


def _pruned_block(
    surgery: Surgery,
    key: BlockKey,
    number: int,
    method: DynamicMethod,
    context: ModelContext,
    recomputing: Recomputing,
    histories: Statistics | None,
    release: bool,
) -> PrunedBlock:
    index, name = key
    modules, norm = surgery.blocks[key], surgery.met[key].norm
    if name is Block.MLP and any(isinstance(value, Tensor) for value in surgery.met[key].given.values()):
        kind = surgery.model.config.model_type
        raise UserError(f"the MLP of {kind} takes more than one tensor, which a probe cannot cut: use a static method")
    runner = BlockRunner(modules, surgery.shape, surgery.plan.unit, surgery.keep[key])
    context.memory.reserve(runner.slices.size)
    # the mean first: making the history may give up what it is made from
    mean = histories.channel_moments(index, name)[0] if histories is not None and method.keeps_mean else None
    history = None if histories is None else histories.second_moment(index, name, release=release)
    before = None if norm is None else getattr(modules.layer, norm)
    block = PrunedBlock(runner, index, number, method, context, recomputing, before, history, mean)
    if not torch.isfinite(block.weight_norm).all():
        raise UserError(
            f"the {name.value} block of layer {index} has weights that are not finite: check the checkpoint"
        )
    return block


def prune_static(
    surgery: Surgery,
    method: StaticMethod,
    calibration_data: CalibrationData,
    keep_dense: bool,
    update: LeastSquares | None,
    turns_of: Callable[[], Turns],
) -> Pruning:
    """Put slices in the place of projections; a mistake on the way leaves the model as it was."""
    plan = surgery.plan
    pruning = Pruning(method, plan, {}, surgery.shape, _can_undo=keep_dense)
    for index in plan.layers:
        whole = [block for block in plan.blocks if block.ratio == 0 and (index, block.block) in surgery.blocks]
        pruning.choices |= {(index, block.block): torch.arange(block.units.number) for block in whole}
    if method.updates and update is None:
        raise UserError(f"{type(method).__name__} updates the weights that stay: pass update=LeastSquares(batches)")
    targets = blocks_to_prune(surgery.model, plan, surgery.keep, surgery.over)
    for target in targets:  # all of them before the first is sliced
        check_sliceable(surgery.blocks[target.key], "static pruning slices")
    with torch.no_grad(), _undone_on_mistakes(pruning), ExitStack() as stack:
        updating = None if update is None else Updating(surgery.model, update, method.restores_means)
        turns = stack.enter_context(turns_of())
        for target, choice in turns.of(method.choose(targets, calibration_data)):
            if updating is not None:
                choice = updating(target, surgery.blocks[target.key], choice)
            turns.note(target.key, choice)
            sliced = slice_block(surgery.blocks[target.key], surgery.shape, plan.unit, choice)
            pruning.choices[target.key] = choice.kept
            if choice.bias is not None:
                pruning.biases[target.key] = choice.bias
            if choice.columns is not None and not turns.leave:
                pruning.columns[target.key] = surgery.blocks[target.key].output_weight.detach()
            if keep_dense:
                pruning._sliced[target.key] = sliced
        if updating is not None:
            pruning.updated = updating.updated
        pruning.places = turns.place
    pruning.keep = {key: len(kept) for key, kept in pruning.choices.items()}
    return pruning


@contextmanager
def _undone_on_mistakes(pruning: Pruning) -> Iterator[None]:
    """Within this context whatever ends the pruning makes the blocks that were sliced already dense again."""
    try:
        yield
    except BaseException:
        for sliced in pruning._sliced.values():
            restore_block(sliced)
        raise


def blocks_to_prune(
    model: PreTrainedModel,
    plan: Plan,
    keep: Mapping[BlockKey, int] | None = None,
    over: Callable[[Tensor], Tensor] | None = None,
) -> list[BlockToPrune]:
    """What a static method has to choose in, layer by layer: the blocks that lose something.

    ``keep`` None takes the plan's uniform counts. ``over`` makes of a block's scores those that counts are made from,
    where processes share its units.
    """
    blocks = blocks_of(model)
    weights = OutputWeights(blocks)
    later = is_settled(layers_of(model)[0])
    return [
        BlockToPrune(index, block, partial(weights.__getitem__, key) if later else weights[key], over)
        for index in plan.layers
        for block in (plan.blocks if keep is None else counted(plan, keep, index))
        if block.ratio > 0 and (key := (index, block.block)) in blocks
    ]


def counted(plan: Plan, keep: Mapping[BlockKey, int], layer: int) -> list[BlockPlan]:
    """The plans of a layer's blocks, with the counts of that layer."""
    return [replace(b, keep=keep[layer, b.block]) for b in plan.blocks if (layer, b.block) in keep]
