"""Counts by what units lose after an update: one ranking over all layers, and a search that starts from it."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pp_lightning.allocation import settled_floors, spread, unit_flops
from pp_lightning.blocks import Block, BlockKey
from pp_lightning.errors import UserError
from pp_lightning.evidence import Evidence
from pp_lightning.families import BlockModules, OutputWeights, blocks_of, layers_of
from pp_lightning.functional.allocation import floor_count
from pp_lightning.functional.least_squares import SecondMoments, losses_in_order
from pp_lightning.functional.selection import unit_channels
from pp_lightning.layerwise import LayerByLayer
from pp_lightning.methods.base import AllocationName, BlockToPrune, StaticMethod
from pp_lightning.plan import Plan
from pp_lightning.progress import Steps
from pp_lightning.searching import Movable, Search
from pp_lightning.statistics import Statistics
from pp_lightning.stored import described, is_settled, places_of, resident, write_whole
from pp_lightning.updating import RIDGE_UNTRIED, LeastSquares, digest_of

_FEW_BATCHES = 2


@dataclass(frozen=True)
class Counts:
    """What an allocation came to.

    Attributes:
        plan: over all layers.
        keep: units that stay in each block.
        path: of a search, for result files.
    """

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
        moments: E[x x^T] at its output matrix, (C, C) float32, where they are kept.
    """

    ranked: Tensor
    losses: Tensor
    moments: Tensor | None


@torch.no_grad()
def measured_counts(
    model: PreTrainedModel,
    plan: Plan,
    method: StaticMethod,
    evidence: Evidence | None,
    update: LeastSquares,
    targets: Sequence[BlockToPrune],
    name: AllocationName,
    floor: float | None,
) -> Counts:
    """Units that stay in each block, at the FLOPs of the uniform plan.

    Args:
        model: dense.
        plan: uniform.
        method: scores units.
        evidence: calibration statistics.
        update: brings the batches.
        targets: every block of the model that loses units.
        name: ``global`` or ``searched``. A search keeps second moments of all blocks.
        floor: fraction that every block keeps; None takes the first of FLOORS that lets enough go.

    Raises:
        UserError: there are no statistics, or second moments are singular or not finite.
    """
    if name == "searched" and is_settled(layers_of(model)[0]):
        raise UserError("allocation=searched runs the model again and again, which cannot be streamed: use global")
    if not isinstance(evidence, Statistics):
        raise UserError(f"allocation={name} needs calibration statistics: pass the result of calibrate()")
    blocks = {
        target.key: method.unit_scores(target, evidence).argsort(descending=True, stable=True) for target in targets
    }
    found = ranked_after_update(model, update, targets, blocks, keep_moments=name == "searched")
    modules = blocks_of(model)
    weights = OutputWeights(modules)
    losses = {key: block.losses for key, block in found.items()}
    whole, keep = spread(plan, method, weights, evidence, "global", floor, losses)
    if name != "searched":
        return Counts(whole, keep, [])
    tokens = evidence.num_positions
    floors = settled_floors(plan, weights.keys(), floor, tokens)
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
    *,
    keep_moments: bool,
) -> dict[BlockKey, RankedBlock]:
    """What losing each unit costs the dense model's blocks, on a quarter of the batches.

    Args:
        model: dense.
        update: brings the batches.
        targets: blocks, in the model's order.
        ranked: units (U,) of each, the one that stays longest first.
        keep_moments: keep every block's second moments.

    Raises:
        UserError: second moments are singular or not finite.
    """
    found, modules = {}, blocks_of(model)
    folder = None if update.folder is None else Path(update.folder) / "ranking"
    about = hashlib.sha256(digest_of(model, update).encode())
    for target in targets:
        about.update(ranked[target.key].cpu().numpy().tobytes())
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
            block = _ranked_block(carried, target, modules[target.key], ranked[target.key], keep_moments)
            if file is not None:
                moments = {} if block.moments is None else {"moments": block.moments}
                write_whole(file, {"losses": block.losses, **moments}, {"about": digest}, "what units cost")
        else:
            place = done.get("moments")
            block = RankedBlock(ranked[target.key], done["losses"].read(), None if place is None else place.read())
        found[target.key] = block
    return found


def _ranked_block(
    carried: LayerByLayer, target: BlockToPrune, modules: BlockModules, ranked: Tensor, keep_moments: bool
) -> RankedBlock:
    with resident(modules.layer):
        weight = modules.output_weight
        moments = SecondMoments(weight.shape[1], weight.device)
        for states in carried.states(modules):
            moments.add(states)
        matrix, width = moments.matrix(), target.units.channels
        try:
            lost = losses_in_order(weight, matrix, unit_channels(ranked, width), RIDGE_UNTRIED)
        except torch.linalg.LinAlgError as error:
            raise UserError(
                f"second moments of the {target.plan.block.value} block of layer {target.layer} are singular or not "
                "finite: give more calibration text, or another dtype"
            ) from error
    losses = lost.view(-1, width).sum(1).float()
    return RankedBlock(ranked, losses, matrix.float() if keep_moments else None)
