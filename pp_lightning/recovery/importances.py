"""LoRA-guided importances: from the gradients of adapters alone, with no gradient of a weight of the model."""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from pp_lightning.blocks import BlockKey
from pp_lightning.calibration_data import fingerprint
from pp_lightning.errors import UserError
from pp_lightning.families import OUTPUT
from pp_lightning.functional.lora import lora_importance
from pp_lightning.gradients import IGNORED, Batch, frozen_except, labels_of, next_token_loss, recomputed
from pp_lightning.importances import Importances, Members, by_role
from pp_lightning.methods.lora_prune import LORA
from pp_lightning.progress import shown
from pp_lightning.pruning import is_pruned
from pp_lightning.recovery.adapters import Adapters, down_of, scale_of, up_of


def lora_importances(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    *,
    rank: int = 8,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Importances:
    """Importances from the first gradient of fresh adapters, accumulated over all batches (LoRAPrune).

    As B is zero, the estimate is ``gB A``: a random projection of the true gradient to ``rank`` dimensions. The model
    is dense; it is run in evaluation mode and left as it was. Batches are as for
    :func:`~pp_lightning.taylor_importances`; ``layers`` None takes all; ``seed`` is of A.

    Raises:
        UserError: no batches, a pruned or unknown model, gradients that are not finite, or no peft.
    """
    if is_pruned(model):
        raise UserError("importances are collected on the dense model: unprune_ it first")
    if not batches:
        raise UserError("no calibration batches")
    found = Importances(fingerprint(model), LORA)
    total = sum(int((labels_of(batch)[:, 1:] != IGNORED).sum()) for batch in batches)
    adapters = Adapters(model, rank, alpha=2.0 * rank, seed=seed)
    try:
        with frozen_except(model, adapters.parameters()), recomputed(model):
            for batch in shown(batches, "adapter gradients", "batch", progress):
                share = int((labels_of(batch)[:, 1:] != IGNORED).sum()) / total
                (next_token_loss(model, batch) * share).backward()
        if not all(bool(gradient.isfinite().all()) for gradient in gradients_of(adapters)):
            raise UserError("the adapters' gradients are not finite: check the checkpoint, or use float32 or bfloat16")
        found.members = adapter_members(adapters, layers)
    finally:
        adapters.detach()
    return found


def adapter_members(adapters: Adapters, layers: Sequence[int] | None = None) -> dict[BlockKey, Members]:
    """Members of :class:`Importances` from the adapters' present values and gradients."""
    members: dict[BlockKey, dict[str, Tensor]] = {}
    for (key, role), layer in adapters.layers():
        if layers is None or key[0] in layers:
            down, up = down_of(layer), up_of(layer)
            assert down.grad is not None and up.grad is not None
            weight = layer.get_base_layer().weight
            vector = lora_importance(weight, down, up, down.grad, up.grad, scale_of(layer), of_outputs=role != OUTPUT)
            members.setdefault(key, {}).update(by_role(role, vector))
    return dict(members)


def gradients_of(adapters: Adapters) -> list[Tensor]:
    """The gradients of all A and B that have one."""
    return [parameter.grad for parameter in adapters.parameters() if parameter.grad is not None]
