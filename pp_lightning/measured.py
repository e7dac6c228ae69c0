"""Counts by what units lose after an update: one ranking over all layers, and a search that starts from it."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pp_lightning.allocation import settled_floors, spread, unit_flops
from pp_lightning.blocks import Block, BlockKey
from pp_lightning.calibration_data import CalibrationData
from pp_lightning.errors import UserError
from pp_lightning.families import BlockModules, OutputWeights, blocks_of, layers_of
from pp_lightning.functional.allocation import floor_count
from pp_lightning.functional.least_squares import SecondMoments, columns_in_order, losses_in_order, ordered_factor
from pp_lightning.functional.selection import unit_channels
from pp_lightning.layerwise import LayerByLayer
from pp_lightning.methods.base import AllocationName, BlockToPrune, StaticMethod
from pp_lightning.plan import Plan
from pp_lightning.progress import Steps
from pp_lightning.searching import Movable, Search
from pp_lightning.sensitivity import PrunedAlone, loss_rises, scaled
from pp_lightning.statistics import Statistics
from pp_lightning.stored import described, is_settled, places_of, resident, write_whole
from pp_lightning.updating import RIDGE_UNTRIED, LeastSquares, digest_of

_FEW_BATCHES = 2


@dataclass(frozen=True)
class Counts:
    """What an allocation came to."""

    plan: Plan
    keep: dict[BlockKey, int]
    path: list[dict[str, Any]]


@dataclass(frozen=True)
class RankedBlock:
    """One block of the dense model.

    Attributes:
        ranked: its units (U,) int64, the one that stays longest first.
        losses: what each adds to the squared error of the block's output, relative to the residual, after an update:
            (U,) float32, in that order.
        count: units that stay where it is pruned alone; all of them where it is not.
        columns: gives the output matrix's columns for these after an update, (D, K) in its dtype, in that order.
        moments: E[x x^T] at its output matrix, (C, C) float32, where they are kept.
    """

    ranked: Tensor
    losses: Tensor
    count: int
    columns: Callable[[], Tensor]
    moments: Tensor | None


@torch.no_grad()
def measured_counts(
    model: PreTrainedModel,
    plan: Plan,
    method: StaticMethod,
    calibration_data: CalibrationData | None,
    update: LeastSquares,
    targets: Sequence[BlockToPrune],
    name: AllocationName,
    floor: float | None,
) -> Counts:
    """Units that stay in each block, at the budget of the uniform plan.

    A search (``name`` is ``searched``) keeps second moments of all blocks; ``targets`` are all blocks of the model that
    lose units.

    Raises:
        UserError: there are no statistics, or second moments are singular or not finite.
    """
    if name == "searched" and is_settled(layers_of(model)[0]):
        raise UserError("allocation=searched runs the model again and again, which cannot be streamed: use global")
    if not isinstance(calibration_data, Statistics):
        raise UserError(f"allocation={name} needs calibration statistics: pass the result of calibrate()")
    blocks = {
        target.key: method.unit_scores(target, calibration_data).argsort(descending=True, stable=True)
        for target in targets
    }
    if update.loss_tokens < 0:
        raise UserError(f"loss_tokens must not be negative, not {update.loss_tokens}")
    share = len(plan.layers) / len(layers_of(model))
    counts = {target.key: _count_alone(target, share) for target in targets}
    found = ranked_after_update(model, update, targets, blocks, counts, keep_moments=name == "searched")
    modules = blocks_of(model)
    weights = OutputWeights(modules)
    losses = losses_by_rise(model, update, targets, found)
    whole, keep = spread(plan, method, weights, calibration_data, "global", floor, losses)
    if name != "searched":
        return Counts(whole, keep, [])
    tokens = plan.counted_tokens(calibration_data.num_positions)
    floors = settled_floors(plan, weights.keys(), floor, calibration_data.num_positions)
    heads = [t.plan for t in targets if t.plan.block is Block.ATTENTION and not t.plan.alike]
    head = unit_flops(heads[0], tokens) * heads[0].round_to if heads else 0
    movable = {}
    for target in targets:
        block, flops, multiple = found[target.key], unit_flops(target.plan, tokens), target.plan.round_to
        step = max(1, round(head / (flops * multiple))) * multiple
        if target.plan.alike:
            step = target.units.number  # there is no room for such a step
        least = floor_count(target.units.number, floors[target.plan.block], multiple)
        assert block.moments is not None
        movable[target.key] = Movable(modules[target.key], block.ranked, block.moments, flops, step, least)
    search = Search(model, movable, update.held_out, RIDGE_UNTRIED, update.passes, update.tell)
    return Counts(whole, keep | search.run({key: keep[key] for key in movable}), search.path)


def ranked_after_update(
    model: PreTrainedModel,
    update: LeastSquares,
    targets: Sequence[BlockToPrune],
    ranked: Mapping[BlockKey, Tensor],
    counts: Mapping[BlockKey, int],
    *,
    keep_moments: bool,
) -> dict[BlockKey, RankedBlock]:
    """What losing each unit costs the dense model's blocks, on a quarter of the batches.

    ``ranked`` has the units (U,) of each target, the one that stays longest first, and ``counts`` how many stay where
    it is pruned alone.
    """
    found, modules = {}, blocks_of(model)
    folder = None if update.folder is None else Path(update.folder) / "ranking"
    about = hashlib.sha256(digest_of(model, update).encode())
    for target in targets:
        about.update(ranked[target.key].cpu().numpy().tobytes() + f"{counts[target.key]}".encode())
    digest = about.hexdigest() + ("+" if keep_moments else "")
    batches = update.batches[: max(_FEW_BATCHES, len(update.batches) // 4)]
    carried = LayerByLayer(model, batches, folder, digest)
    steps = Steps("ranking", "layer", len(layers_of(model)))
    steps.skip(carried.layer)
    for target in targets:
        file = None if folder is None else folder / f"{target.layer}-{target.plan.block.value}.safetensors"
        done = None if file is None or described(file) != digest else places_of(file)
        if done is None and target.layer < carried.layer:
            carried.restart()
        while carried.layer < target.layer:
            carried.advance()
            update.tell(steps.line(carried.layer))
        if done is None:
            what = ranked[target.key], counts[target.key], keep_moments
            tensors = _ranked_block(carried, target, modules[target.key], *what)
            if file is not None:
                write_whole(file, tensors, {"about": digest}, "what units cost")
                done = places_of(file)
        read = tensors.__getitem__ if done is None else lambda name, done=done: done[name].read()
        found[target.key] = RankedBlock(
            ranked[target.key],
            read("losses"),
            counts[target.key],
            partial(read, "columns"),
            read("moments") if keep_moments else None,
        )
    return found


def losses_by_rise(
    model: PreTrainedModel, update: LeastSquares, targets: Sequence[BlockToPrune], found: Mapping[BlockKey, RankedBlock]
) -> dict[BlockKey, Tensor]:
    """Losses (U,) of each block's units, scaled by what pruning it alone does to the loss on tokens held out.

    Where nothing is held out, or the model predicts no next token, they stay as they are.
    """
    losses = {key: block.losses for key, block in found.items()}
    batches = update.loss_rows
    if not update.held_out:
        update.tell(
            f"one calibration batch leaves nothing held out: blocks are not compared by the loss, the ridge is "
            f"{RIDGE_UNTRIED}: take more windows, or smaller batches"
        )
    if not batches or not model.can_generate():
        return losses
    modules, alone = blocks_of(model), {}
    about = hashlib.sha256(f"{digest_of(model, update)} {update.loss_tokens}".encode())
    for target in targets:
        block = found[target.key]
        if block.count < target.units.number:
            kept = unit_channels(block.ranked[: block.count], target.units.channels)
            about.update(kept.cpu().numpy().tobytes())
            alone[target.key] = PrunedAlone(modules[target.key], kept, block.columns)
    folder = None if update.folder is None else Path(update.folder) / "alone"
    rises = loss_rises(model, batches, alone, folder, about.hexdigest(), update.tell)
    return losses | scaled({key: losses[key] for key in rises}, {key: found[key].count for key in rises}, rises)


def _count_alone(target: BlockToPrune, share: float) -> int:
    """Units that stay in a block that is pruned alone: as in a layer on average; all where blocks are not ranked."""
    units, plan = target.units.number, target.plan
    if plan.alike or not plan.ratio:
        return units
    return units - min(units - 1, max(1, round((units - plan.keep) * share)))


def _ranked_block(
    carried: LayerByLayer, target: BlockToPrune, modules: BlockModules, ranked: Tensor, count: int, keep_moments: bool
) -> dict[str, Tensor]:
    with resident(modules.layer):
        weight = modules.output_weight
        moments = SecondMoments(weight.shape[1], weight.device)
        for states in carried.states(modules):
            moments.add(states)
        matrix, width = moments.matrix(), target.units.channels
        order = unit_channels(ranked, width)
        try:
            factor = ordered_factor(matrix, order, RIDGE_UNTRIED)
        except torch.linalg.LinAlgError as error:
            raise UserError(
                f"second moments of the {target.plan.block.value} block of layer {target.layer} are singular or not "
                "finite: give more calibration text, or another dtype"
            ) from error
        losses = losses_in_order(weight, order, factor).view(-1, width).sum(1).float()
        kept = {"losses": losses} | ({"moments": matrix.float()} if keep_moments else {})
        if count < len(ranked):
            kept["columns"] = columns_in_order(weight, order, factor, count * width).to(weight.dtype)
    return kept
