"""The rows of the table: one model under many regimes, all of them on the same weights."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from pp_lightning.errors import UserError, unknown
from pp_lightning.families import layers_of
from pp_lightning.importances import Importances
from pp_lightning.methods import (
    FullBatchProbing,
    Griffin,
    ProbePruning,
    PruningMethod,
    StaticPPsp,
    method_labels,
    method_named,
)
from pp_lightning.prefill import Prefill
from pp_lightning.pruning import prune_
from pp_lightning.statistics import Statistics


@dataclass(frozen=True)
class Variant:
    """One way to run the model.

    Attributes:
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


_COMPILED = ", compiled"
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


def variant_named(name: str) -> Variant:
    """The variant of this name, or a method by its label, ``pp`` or ``flap``, with ``, compiled`` behind it or not.

    Raises:
        UserError: there is no such variant, or it chooses from gradients, which are not collected here.
    """
    if name in VARIANTS:
        return VARIANTS[name]
    label = name.removesuffix(_COMPILED)
    if label not in method_labels():
        raise unknown("variant", label, ["all", *method_labels(), *VARIANTS])
    method = method_named(label)
    if method.calibration_data is Importances:
        raise UserError(f"{label} chooses from importances, which benchmark does not collect: leave it out")
    return Variant(method, compiled=name != label)


def chosen_variants(names: Sequence[str]) -> dict[str, Variant]:
    """The named variants and the two dense ones, in the table's order; a method gives an eager and a compiled one."""
    if not names:
        raise UserError("no variants are named: leave the option out for all of them")
    own = {
        name: variant for name, variant in VARIANTS.items() if "all" in names or name in names or variant.method is None
    }
    more = [name for name in names if name not in VARIANTS and name != "all"]
    return own | {one: variant_named(one) for name in more for one in (name, name + _COMPILED)}


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
