"""Prune a transformers model in place, look at its choices, and undo it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pp_lightning.allocation import spread
from pp_lightning.blocks import AttentionUnit, Block, BlockKey, ModelShape
from pp_lightning.calibration_data import CalibrationData
from pp_lightning.errors import UserError
from pp_lightning.families import BlockModules, OutputWeights, blocks_of, layers_of, refusal, shape_of_model
from pp_lightning.importances import Importances
from pp_lightning.measured import measured_counts
from pp_lightning.methods.base import AllocationName, PruningMethod, StaticMethod
from pp_lightning.methods.dynamic import DynamicMethod
from pp_lightning.plan import Amounts, Budget, Plan, make_plan
from pp_lightning.prefill import Prefill, checked_refresh, dense_below, dense_rows
from pp_lightning.progress import Tell, ignore_line
from pp_lightning.pruned.check import Meeting, check_block, kinds_of, meetings
from pp_lightning.pruned.choice import Choice
from pp_lightning.pruned.conversations import HeldSlices
from pp_lightning.pruned.static import check_sliceable, restore_block
from pp_lightning.pruned.turns import Turns
from pp_lightning.saving import guard, release
from pp_lightning.shares import give_back, keep_for_good, own_share
from pp_lightning.statistics import Statistics
from pp_lightning.stored import is_stored, resident
from pp_lightning.surgery import Pruning, Serving, Surgery, blocks_to_prune, prune_dynamic, prune_static
from pp_lightning.updating import LeastSquares

_ATTRIBUTE = "_pp_lightning"
COMPILED = "_pp_lightning_compiled"  # where compile_ leaves its record
_SOURCES = {
    Statistics: "calibration statistics: pass the result of calibrate()",
    Importances: "importances: pass the result of taylor_importances() or lora_importances()",
}


@dataclass(frozen=True)
class KeptUnits:
    """The units of one layer that the last batch ran on, ascending.

    Attributes:
        attention: (K,) int64 indices of heads, or of key/value groups.
        mlp: (K,) int64 indices of MLP channels.
    """

    attention: Tensor
    mlp: Tensor


@torch.inference_mode(False)
def prune_(
    model: PreTrainedModel,
    method: PruningMethod,
    calibration_data: CalibrationData | None = None,
    *,
    pruning_ratio: float,
    skip_layers: Sequence[int] = (0, 1, 2),
    round_to: int = 64,
    attention_ratio: float | None = None,
    mlp_ratio: float | None = None,
    allocation: AllocationName | None = None,
    floor: float | None = None,
    budget: Budget = "flops",
    stays: float | None = None,
    tensor_parallel: int = 1,
    uniform_heads: bool = False,
    keep_dense: bool = True,
    release_stats: bool = False,
    held_slices: int | str = 1,
    prefill: Prefill | None = None,
    refresh: int | None = None,
    update: LeastSquares | None = None,
    folder: str | Path | None = None,
    tell: Tell = ignore_line,
) -> None:
    """Prune a transformer in place. It stays the transformers model it was: same class, same call.

    A dynamic method changes no weight: layers choose for every batch. A static method replaces projections by slices.

    Args:
        model: dense, of any type whose blocks are found and pass the check, see :mod:`pp_lightning.families`. Where
            transformers has spread it over processes (``tp_plan``), each of them must call this, and has units of its
            own: counts, indices and statistics are a process's.
        method: one of :mod:`pp_lightning.methods`.
        calibration_data: of the kind that the method says: statistics from :func:`calibrate` for most, importances for
            LLM-Pruner and LoRAPrune; may be None where the method needs none.
        pruning_ratio: fraction of units removed over the whole model, in [0, 1). This and the next ten are explained
            at :class:`~pp_lightning.plan.Amounts`.
        skip_layers: layers left dense; the others lose more to make up for them.
        round_to: MLP channels are kept in multiples of this.
        attention_ratio: ratio for attention alone; None takes ``pruning_ratio``.
        mlp_ratio: ratio for MLPs alone; None takes ``pruning_ratio``.
        allocation: how units are spread over layers: ``uniform``, ``outliers``, ``global`` or ``searched``; None takes
            the method's own.
        floor: fraction of its units that every block keeps under ``global``.
        budget: what ``global`` leaves as much of as uniform counts: ``flops`` or ``params``.
        stays: fraction of it that ``global`` leaves; None takes what uniform counts leave.
        tensor_parallel: devices that are to share every block evenly.
        uniform_heads: the same number of heads in every layer, none skipped.
        keep_dense: keep a static method's dense weights for :func:`unprune_`. False saves their memory.
        release_stats: empty a dynamic method's statistics while pruning, so that a history never exists twice.
        held_slices: conversations (key/value caches) whose sliced weights a dynamic method holds while decoding, or
            their bytes: ``"2GB"``. The least recently used are let go, and sliced again when they go on.
        prefill: how a dynamic method runs a prompt, which is a batch that fills a cache: ``probe``, pruned like any
            batch; ``dense``, on all units, and its own states choose for the tokens that follow; ``auto``, dense where
            a probe would not pay for so few tokens; or a number of tokens (rows x length) below which it is dense. None
            takes the method's own.
        refresh: decoded tokens after which a dynamic method chooses MLP channels again, by what they show. Heads stay:
            those that were dropped have no keys for these tokens. None holds the prompt's choice.
        update: let what a static method keeps take over what goes, block by block on calibration batches; a mistake on
            the way leaves the model as it was, unless ``keep_dense`` is off. None keeps the weights as they are.
        folder: where a static method leaves the pruned layers of a model whose weights stay on disk
            (:func:`~pp_lightning.load_streamed`); None makes one that goes with the model. What it has of an
            interrupted run with the same choices is not written again.
        tell: told of each layer that is left there.

    Raises:
        UserError: the model is not supported or already pruned, the ratios leave nothing, or calibration data is
            missing, of another kind or model, or does not cover what is needed.
    """
    ratios = (pruning_ratio, attention_ratio, mlp_ratio)
    amounts = Amounts(*ratios, skip_layers, round_to, tensor_parallel, uniform_heads, allocation, floor, budget, stays)
    if not isinstance(method, PruningMethod):
        raise UserError(f"method must be one of pp_lightning.methods, such as FLAP(), not {method!r}")
    if hasattr(model, _ATTRIBUTE):
        raise UserError("the model is pruned already: unprune_ it first")
    _check_not_compiled(model)
    _check_loaded(model)
    check_family(model, method)
    with own_share(model, for_good=True) as share:
        if share is not None:
            _check_shared(method, update)
        blocks, shape = blocks_of(model), shape_of_model(model)
        plan = make_plan(shape, method, amounts)
        _check_calibration_data(model, method, calibration_data)
        if isinstance(method, StaticMethod) and (prefill, refresh) != (None, None):
            raise UserError(f"{type(method).__name__} has chosen before any prompt: leave prefill and refresh out")
        stats = calibration_data if isinstance(calibration_data, Statistics) else None
        weights, counted_by = OutputWeights(blocks), None if share is None else share.counted_by
        name, path = amounts.allocation or method.allocation, []
        if update is not None and isinstance(method, StaticMethod) and name in ("global", "searched"):
            targets = blocks_to_prune(model, replace(plan, layers=tuple(range(len(layers_of(model))))))
            counts = measured_counts(model, plan, method, calibration_data, update, targets, name, amounts.floor)
            plan, keep, path = counts.plan, counts.keep, counts.path
        else:
            plan, keep = spread(plan, method, weights, stats, amounts.allocation, amounts.floor, over=counted_by)
        met = _checked(model, blocks, shape, plan, keep)
        surgery = Surgery(model, blocks, shape, plan, keep, met, counted_by)
        if isinstance(method, DynamicMethod):
            if update is not None:
                raise UserError(f"{type(method).__name__} chooses for every batch, leave update out")
            way = method.prefill if prefill is None else prefill
            below, rows = dense_below(way, model.device), dense_rows(way)
            serving = Serving(HeldSlices(held_slices), below, checked_refresh(refresh), rows)
            pruning = prune_dynamic(surgery, method, stats, release_stats, serving)
        else:
            assert isinstance(method, StaticMethod)
            found = Statistics(model="") if calibration_data is None else calibration_data
            pruning = prune_static(surgery, method, found, keep_dense, update, partial(Turns, model, folder, tell))
        heads = {key for key in pruning.keep if key[1] is Block.ATTENTION} - surgery.whole().keys()
        if not pruning._can_undo:
            keep_for_good(model)
        pruning.path = path
        guard(model, dynamic=pruning.context is not None and share is None, narrow_heads=bool(heads))
        setattr(model, _ATTRIBUTE, pruning)


@torch.inference_mode(False)
def unprune_(model: PreTrainedModel) -> None:
    """Make a pruned model the dense one again, bit for bit.

    Raises:
        UserError: the model is not pruned, or its dense weights were given up (``keep_dense=False``).
    """
    pruning = pruning_of(model)
    _check_not_compiled(model)
    if not pruning._can_undo:
        raise UserError("the dense weights were given up with keep_dense=False: load the model again")
    for sliced in pruning._sliced.values():
        check_sliceable(sliced.runner.modules, "unprune_ takes away")
    for sliced in pruning._sliced.values():
        restore_block(sliced)
    for block in pruning.pruners.values():
        block.runner.remove()
        block.recomputing.detach()
        del block.runner.module.pruner
    for hook in pruning._hooks:
        hook.remove()
    if pruning._attention is not None:
        model.set_attn_implementation(pruning._attention)
    release(model)
    give_back(model)
    delattr(model, _ATTRIBUTE)


def _check_loaded(model: PreTrainedModel) -> None:
    if any(weight.is_meta and not is_stored(weight) for weight in model.parameters()):
        raise UserError("weights are offloaded, and pruning needs all of them: load the model where it fits")


def _check_shared(method: PruningMethod, update: LeastSquares | None) -> None:
    """Refuse what needs more than the units of one process."""
    name = type(method).__name__
    if update is not None or method.updates:
        raise UserError(f"{name} with an update needs whole blocks: prune in one process, not under tensor parallelism")
    if method.needs_statistics and method.calibration_data is not Statistics:
        raise UserError(f"{name} chooses from {method.calibration_data.called} of whole blocks: prune in one process")


def _check_not_compiled(model: PreTrainedModel) -> None:
    if hasattr(model, COMPILED):
        raise UserError("the model is compiled: uncompile_ it first")


def kept_units(model: PreTrainedModel) -> dict[int, KeptUnits]:
    """The units that each pruned layer kept for the last batch (for good, with a static method), by layer index.

    Empty for a dynamic method before its first batch.

    Raises:
        UserError: the model is not pruned.
    """
    pruning = pruning_of(model)
    last = last_choices(model)
    if pruning.pruners and not last:
        return {}
    units = pruning.choices | {key: choice.kept for key, choice in last.items()}
    kept = {key: one.clone() for key, one in units.items()}
    nothing = torch.empty(0, dtype=torch.long)
    layers = sorted({layer for layer, _ in kept})
    return {i: KeptUnits(kept.get((i, Block.ATTENTION), nothing), kept.get((i, Block.MLP), nothing)) for i in layers}


def last_choices(model: PreTrainedModel) -> dict[BlockKey, Choice]:
    """What each block that chooses ran the last batch on; empty before the first."""
    pruning = pruning_of(model)
    last = None if pruning.context is None else pruning.context.last
    return {} if last is None else dict(zip(pruning.pruners, last, strict=True))


@contextmanager
def frozen_history(model: PreTrainedModel) -> Iterator[None]:
    """Within this context batches leave the state as it is: for warm-up, or for independent evaluations.

    Raises:
        UserError: the model is not pruned.
    """
    context = pruning_of(model).context
    if context is None:  # a static method has no history
        yield
        return
    before, context.frozen = context.frozen, True
    try:
        yield
    finally:
        context.frozen = before


def is_pruned(model: PreTrainedModel) -> bool:
    """Whether :func:`prune_` is in effect."""
    return hasattr(model, _ATTRIBUTE)


def pruning_of(model: PreTrainedModel) -> Pruning:
    """The record of what :func:`prune_` did.

    Raises:
        UserError: the model is not pruned.
    """
    pruning = getattr(model, _ATTRIBUTE, None)
    if pruning is None:
        raise UserError("the model is not pruned: prune_ it first")
    assert isinstance(pruning, Pruning)
    return pruning


def _check_calibration_data(
    model: PreTrainedModel, method: PruningMethod, calibration_data: CalibrationData | None
) -> None:
    """Refuse calibration data that is missing, or of another kind or model."""
    if not method.needs_statistics:
        return
    if not isinstance(calibration_data, method.calibration_data):
        name, wanted = type(method).__name__, method.calibration_data
        raise UserError(f"{name} needs {_SOURCES.get(wanted, wanted.called)}")
    calibration_data.check_model(model)


def check_family(model: PreTrainedModel, method: PruningMethod) -> None:
    """Refuse blocks that are known not to be prunable, before any work."""
    for block in method.blocks:
        _refuse(block, refusal(model, block), model)
    if method.attention_unit is AttentionUnit.QUERY_HEAD and not method.splits_groups and shape_of_model(model).grouped:
        name = type(method).__name__
        raise UserError(f"{name} removes whole key/value groups of this model: use attention_unit=kv_group")


def _checked(
    model: PreTrainedModel,
    blocks: Mapping[BlockKey, BlockModules],
    shape: ModelShape,
    plan: Plan,
    keep: Mapping[BlockKey, int],
) -> Mapping[BlockKey, Meeting]:
    """What every block meets, after each kind of block that is to lose something has been tried."""
    wanted = [block.block for block in plan.blocks if block.ratio > 0]
    met = meetings(model, blocks)
    firsts = kinds_of(model)
    for key in sorted(
        {(firsts[layer], block) for layer, block in keep if block in wanted and (layer, block) in blocks}
    ):
        splits_groups = plan.unit is AttentionUnit.QUERY_HEAD and 1 < shape.num_key_value_heads < shape.num_heads
        if splits_groups and key[1] is Block.ATTENTION and blocks[key].is_fused:
            _refuse(key[1], "its queries and keys are one projection, use attention_unit=kv_group", model)
        try:
            with resident(blocks[key].layer):
                check_block(blocks[key], shape, plan.unit, met[key])
        except UserError as reason:
            _refuse(key[1], str(reason), model)
    return met


def _refuse(block: Block, reason: str | None, model: PreTrainedModel) -> None:
    if reason is not None:
        other = Block.MLP if block is Block.ATTENTION else Block.ATTENTION
        way = f"; blocks=({other.value!r},) leaves it alone" if refusal(model, other) is None else ""
        raise UserError(f"the {block.value} of {model.config.model_type} cannot be pruned: {reason}{way}")
