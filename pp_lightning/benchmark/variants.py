"""The rows of the table: one model under many regimes, all of them on the same weights."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from pp_lightning.errors import UserError
from pp_lightning.families import layers_of
from pp_lightning.methods import FullBatchProbing, Griffin, ProbePruning, PruningMethod, StaticPPsp
from pp_lightning.prefill import Prefill
from pp_lightning.pruning import prune_
from pp_lightning.statistics import Statistics


@dataclass(frozen=True)
class Variant:
    """One way to run the model.

    Attributes:
        method: how it is pruned; None is dense.
        compiled: whether its layers are compiled. It stands against the dense model that is, or is not, compiled too.
        decodes: whether decoding is timed; ways to choose that hold a choice as others do need not be.
        whole: whether batches without a cache are timed.
        prefill: how prompts run; None is the method's own way.
    """

    method: PruningMethod | None
    compiled: bool
    decodes: bool = True
    whole: bool = True
    prefill: Prefill | None = None


VARIANTS: Mapping[str, Variant] = {
    "dense": Variant(None, compiled=False),
    "dense, compiled": Variant(None, compiled=True),
    "static PPsp": Variant(StaticPPsp(), compiled=False),
    "static PPsp, compiled": Variant(StaticPPsp(), compiled=True),
    "PP": Variant(ProbePruning(), compiled=False),
    "PP, compiled": Variant(ProbePruning(), compiled=True),
    "PP, prefill auto": Variant(ProbePruning(), compiled=False, whole=False, prefill="auto"),
    "PP, prefill auto, compiled": Variant(ProbePruning(), compiled=True, whole=False, prefill="auto"),
    "best for generation": Variant(ProbePruning.best(generation=True), compiled=False, whole=False),
    "best for generation, compiled": Variant(ProbePruning.best(generation=True), compiled=True, whole=False),
    "GRIFFIN (MLPs)": Variant(Griffin(), compiled=False, whole=False),
    "GRIFFIN (MLPs), compiled": Variant(Griffin(), compiled=True, whole=False),
    "PP, best()": Variant(ProbePruning.best(), compiled=False, decodes=False),
    "PP, best(), compiled": Variant(ProbePruning.best(), compiled=True, decodes=False),
    "PP, parallel probing": Variant(ProbePruning(probe_source="previous"), compiled=False, decodes=False),
    "PP, parallel probing, compiled": Variant(ProbePruning(probe_source="previous"), compiled=True, decodes=False),
    "Full-Batch Probing": Variant(FullBatchProbing(), compiled=False, decodes=False),
    "Full-Batch Probing, compiled": Variant(FullBatchProbing(), compiled=True, decodes=False),
}


def chosen_variants(names: Sequence[str]) -> dict[str, Variant]:
    """The named variants, in the table's order, and the two dense ones.

    Raises:
        UserError: there is no such variant.
    """
    unknown = sorted(set(names) - set(VARIANTS) - {"all"})
    if unknown:
        raise UserError(f"unknown variant {unknown[0]!r}: choose from all, {'; '.join(VARIANTS)}")
    return {
        name: variant for name, variant in VARIANTS.items() if "all" in names or name in names or variant.method is None
    }


def reference_of(variant: Variant) -> str:
    """The dense row that a variant stands against."""
    return "dense, compiled" if variant.compiled else "dense"


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that shares its parameters with the original; all else is its own."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def pruned_copy(
    model: PreTrainedModel,
    variant: Variant,
    statistics: Statistics,
    *,
    pruning_ratio: float,
    skip_layers: Sequence[int],
    round_to: int,
) -> PreTrainedModel:
    """A copy of a dense model, pruned as the variant says. What pruning does not change is shared with the original.

    A dynamic method lays output matrices out by columns, so these are copied, and the original keeps its own layout.
    """
    copied = sharing_copy(model)
    if variant.method is None:
        return copied
    matrices = (one for layer in layers_of(copied) for one in layer.modules() if isinstance(one, torch.nn.Linear))
    for module in matrices:  # none outside of layers: one that is tied to the embeddings must stay so
        module.weight = torch.nn.Parameter(module.weight.data, requires_grad=False)
    needed = statistics if variant.method.needs_statistics else None
    prune_(
        copied,
        variant.method,
        needed,
        pruning_ratio=pruning_ratio,
        skip_layers=skip_layers,
        round_to=round_to,
        keep_dense=False,
        prefill=variant.prefill,
    )
    return copied
