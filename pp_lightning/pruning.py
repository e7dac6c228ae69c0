"""Prune a transformers model in place, look at its choices, and undo it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from pp_lightning.allocation import spread
from pp_lightning.architectures import Architecture, ModelShape, architecture_of, shape_of
from pp_lightning.blocks import AttentionUnit, Block, BlockPlan, block_modules
from pp_lightning.errors import UserError
from pp_lightning.evidence import Evidence
from pp_lightning.importances import Importances
from pp_lightning.methods.base import AllocationName, BlockToPrune, PruningMethod, StaticMethod
from pp_lightning.methods.dynamic import DynamicMethod
from pp_lightning.plan import Plan, make_plan
from pp_lightning.pruned.context import BatchContext
from pp_lightning.pruned.dynamic import layer_pruner
from pp_lightning.pruned.layer import LayerPruner, install_pruner, publish_residual, remove_pruner
from pp_lightning.pruned.lots import Lots
from pp_lightning.pruned.static import SlicedBlock, restore_block, slice_block
from pp_lightning.statistics import BlockKey, Statistics

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


@dataclass
class Pruning:
    """What :func:`prune_` did to a model: enough to report it and to undo it.

    Attributes:
        method: the policy.
        plan: layers and uniform counts.
        keep: units that stay, for every pruned block (FLAP's differ from layer to layer).
        context: shared by the layers of a dynamically pruned model; None for a static method.
        choices: the kept units of a static method.
        biases: what it added to the outputs of its blocks, where anything.
    """

    method: PruningMethod
    plan: Plan
    keep: dict[BlockKey, int]
    context: BatchContext | None = None
    choices: dict[BlockKey, Tensor] = field(default_factory=dict)
    biases: dict[BlockKey, Tensor] = field(default_factory=dict)
    _sliced: dict[BlockKey, SlicedBlock] = field(default_factory=dict)
    _hooks: list[RemovableHandle] = field(default_factory=list)
    _can_undo: bool = True


def prune_(
    model: PreTrainedModel,
    method: PruningMethod,
    evidence: Evidence | None = None,
    *,
    pruning_ratio: float,
    skip_layers: Sequence[int] = (0, 1, 2),
    round_to: int = 64,
    attention_ratio: float | None = None,
    mlp_ratio: float | None = None,
    allocation: AllocationName | None = None,
    floor: float | None = None,
    keep_dense: bool = True,
    release_stats: bool = False,
    pack_slices: bool = False,
) -> None:
    """Prune a causal language model in place. It stays the transformers model it was: same class, same call.

    A dynamic method changes no weight: layers choose for every batch. A static method replaces projections by slices.

    Args:
        model: LLaMA, Mistral, Qwen2, Qwen3 or OPT, with SDPA (or eager) attention.
        method: one of :mod:`pp_lightning.methods`.
        evidence: what ``method.evidence`` says: statistics from :func:`calibrate` for most methods, importances for
            LLM-Pruner and LoRAPrune; may be None where the method needs none.
        pruning_ratio: fraction of units removed over the whole model, in [0, 1).
        skip_layers: layers left dense; the others lose more to make up for them. With ``allocation="global"`` they
            only say, through the uniform plan, how much is saved: no layer is skipped by rule.
        round_to: MLP channels are kept in multiples of this.
        attention_ratio: ratio for attention alone; None takes ``pruning_ratio``.
        mlp_ratio: ratio for MLPs alone; None takes ``pruning_ratio``.
        allocation: ``uniform``, the same ratio in every layer that is not skipped, or ``global``, where one ranking
            over the units of all layers decides at the same FLOPs; None takes the method's own.
        floor: fraction of its units that every block keeps under ``global``; None takes 0.35 in attention and 0.25 in
            MLPs, or 0.25 in both where that would leave too little to remove.
        keep_dense: keep a static method's dense weights for :func:`unprune_`. False saves their memory.
        release_stats: empty a dynamic method's statistics while pruning, so that a history never exists twice.
        pack_slices: with a dynamic method, keep every block's slice between batches and copy only what the next choice
            changes: faster for small batches on a CPU, and costs the memory of all slices.

    Raises:
        UserError: the model is not supported or already pruned, the ratios leave nothing, or ``evidence`` is missing,
            of another kind or model, or does not cover what is needed.
    """
    architecture, shape = architecture_of(model.config), shape_of(model.config)
    if hasattr(model, _ATTRIBUTE):
        raise UserError("the model is pruned already: unprune_ it first")
    _check_not_compiled(model)
    _check_loaded(model)
    plan = make_plan(
        shape,
        method,
        pruning_ratio=pruning_ratio,
        attention_ratio=attention_ratio,
        mlp_ratio=mlp_ratio,
        skip_layers=skip_layers,
        round_to=round_to,
    )
    _check_evidence(model, method, evidence)
    stats = evidence if isinstance(evidence, Statistics) else None
    plan, keep = spread(plan, method, _output_weights(model, architecture), stats, allocation, floor)
    if isinstance(method, DynamicMethod):
        pruning = _prune_dynamic(model, architecture, shape, method, plan, keep, stats, release_stats, pack_slices)
    else:
        assert isinstance(method, StaticMethod)
        found = Statistics(model="") if evidence is None else evidence
        pruning = _prune_static(model, architecture, shape, method, plan, keep, found, keep_dense)
    setattr(model, _ATTRIBUTE, pruning)


def unprune_(model: PreTrainedModel) -> None:
    """Make a pruned model the dense one again, bit for bit.

    Raises:
        UserError: the model is not pruned, or its dense weights were given up (``keep_dense=False``).
    """
    pruning = pruning_of(model)
    _check_not_compiled(model)
    if not pruning._can_undo:
        raise UserError("the dense weights were given up with keep_dense=False: load the model again")
    layers = architecture_of(model.config).layers_of(model)
    for (index, _), sliced in pruning._sliced.items():
        restore_block(layers[index], sliced)
    if pruning.context is not None:
        for index in pruning.plan.layers:
            remove_pruner(layers[index])
    for hook in pruning._hooks:
        hook.remove()
    delattr(model, _ATTRIBUTE)


def _check_loaded(model: PreTrainedModel) -> None:
    if any(weight.is_meta for weight in model.parameters()):
        raise UserError("weights are offloaded, and pruning needs all of them: load the model where it fits")


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
    if pruning.context is None:
        attention, mlp = Block.ATTENTION, Block.MLP
        return {i: KeptUnits(pruning.choices[i, attention], pruning.choices[i, mlp]) for i in pruning.plan.layers}
    if not pruning.context.chosen:
        return {}
    return {index: KeptUnits(p.attention.kept.clone(), p.mlp.kept.clone()) for index, p in pruners_of(model).items()}


@contextmanager
def frozen_history(model: PreTrainedModel) -> Iterator[None]:
    """Within this context batches leave the histories as they are: for warm-up, or for independent evaluations.

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


def pruners_of(model: PreTrainedModel) -> dict[int, LayerPruner]:
    """The pruners of a dynamically pruned model's layers, by layer index."""
    layers = architecture_of(model.config).layers_of(model)
    return {i: p for i, layer in enumerate(layers) if isinstance(p := getattr(layer, "pruner", None), LayerPruner)}


def blocks_to_prune(
    model: PreTrainedModel, plan: Plan, keep: Mapping[BlockKey, int] | None = None
) -> list[BlockToPrune]:
    """What a static method has to choose in, layer by layer: the blocks that lose something.

    Args:
        model: dense.
        plan: layers and ratios.
        keep: units that stay in each block; None takes the plan's uniform counts.

    Raises:
        UserError: single query heads of grouped ones are asked for.
    """
    if shape_of(model.config).grouped and plan.unit is AttentionUnit.QUERY_HEAD:
        raise UserError("static methods remove whole key/value groups of this model: use attention_unit=kv_group")
    architecture = architecture_of(model.config)
    layers = architecture.layers_of(model)
    return [
        BlockToPrune(index, block, block_modules(architecture, layers[index], block.block).output_weight)
        for index in plan.layers
        for block in (plan.blocks if keep is None else _counted(plan, keep, index))
        if block.ratio > 0
    ]


def _check_evidence(model: PreTrainedModel, method: PruningMethod, evidence: Evidence | None) -> None:
    """Refuse evidence that is missing, or of another kind or model."""
    if not method.needs_statistics:
        return
    if not isinstance(evidence, method.evidence):
        name, wanted = type(method).__name__, method.evidence
        raise UserError(f"{name} needs {_SOURCES.get(wanted, wanted.called)}")
    evidence.check_model(model)


def _prune_dynamic(
    model: PreTrainedModel,
    architecture: Architecture,
    shape: ModelShape,
    method: DynamicMethod,
    plan: Plan,
    keep: dict[BlockKey, int],
    stats: Statistics | None,
    release: bool,
    packs: bool,
) -> Pruning:
    if model.config._attn_implementation not in ("sdpa", "eager"):
        raise UserError('dynamic pruning runs SDPA: load the model with attn_implementation="sdpa"')
    histories = stats if method.keeps_history else None
    layers = architecture.layers_of(model)
    num_positions = None if histories is None else histories.num_positions
    context = BatchContext(num_positions, Lots(method, len(layers)))
    pruners = {  # all of them before the first is installed: a mistake leaves the model as it was
        index: layer_pruner(
            layers[index],
            index,
            architecture,
            shape,
            _counted(plan, keep, index),
            method,
            context,
            histories,
            release,
            packs,
        )
        for index in plan.layers
    }
    for index, pruner in pruners.items():
        install_pruner(layers[index], pruner)
    hooks = [architecture.decoder_of(model).register_forward_pre_hook(context.begin_batch, with_kwargs=True)]
    if method.probe_source == "previous":
        before = {index - 1 for index in plan.layers if index > 0} - set(plan.layers)
        hooks += [
            publish_residual(layers[index].get_submodule(architecture.mlp_norm), context) for index in sorted(before)
        ]
    return Pruning(method, plan, keep, context, _hooks=hooks)


def _output_weights(model: PreTrainedModel, architecture: Architecture) -> dict[BlockKey, Tensor]:
    layers = enumerate(architecture.layers_of(model))
    return {(i, b): block_modules(architecture, layer, b).output_weight for i, layer in layers for b in Block}


def _counted(plan: Plan, keep: Mapping[BlockKey, int], layer: int) -> tuple[BlockPlan, BlockPlan]:
    """The plan of a layer's attention and of its MLP block, with the counts of that layer."""
    attention, mlp = (replace(block, keep=keep[layer, block.block]) for block in plan.blocks)
    return attention, mlp


def _prune_static(
    model: PreTrainedModel,
    architecture: Architecture,
    shape: ModelShape,
    method: StaticMethod,
    plan: Plan,
    keep: dict[BlockKey, int],
    evidence: Evidence,
    keep_dense: bool,
) -> Pruning:
    layers = architecture.layers_of(model)
    pruning = Pruning(method, plan, {}, _can_undo=keep_dense)
    for index in plan.layers:
        whole = [block for block in plan.blocks if block.ratio == 0]
        pruning.choices |= {(index, block.block): torch.arange(block.units.number) for block in whole}
    with torch.no_grad():
        for target, choice in method.choose(blocks_to_prune(model, plan, keep), evidence):
            layer = layers[target.layer]
            sliced = slice_block(layer, architecture, shape, target.plan, choice)
            pruning.choices[target.key] = choice.kept
            if choice.bias is not None:
                pruning.biases[target.key] = choice.bias
            if keep_dense:
                pruning._sliced[target.key] = sliced
    pruning.keep = {key: len(kept) for key, kept in pruning.choices.items()}
    return pruning
