"""From a choice per batch to a choice for good."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from pp_lightning.blocks import Block
from pp_lightning.errors import UserError
from pp_lightning.interfaces import model_inputs, without_head
from pp_lightning.methods.dynamic import DynamicMethod
from pp_lightning.methods.frozen import FrozenOnText
from pp_lightning.pruning import frozen_history, kept_units, pruning_of


@torch.no_grad()
def choice_for(model: PreTrainedModel, batch: Mapping[str, Any]) -> FrozenOnText:
    """The units that a dynamically pruned model keeps for a batch, as a static method that keeps just these.

    To make the choice permanent, ``unprune_`` the model and ``prune_`` it with the result and the same ratios. Its
    logits on the batch are then the dynamic model's.

    Args:
        model: pruned by a dynamic method; its history stays as it is.
        batch: ``input_ids`` (B, S) and optionally ``attention_mask`` and ``position_ids`` (B, S).

    Raises:
        UserError: the model is not pruned by a dynamic method.
    """
    method = pruning_of(model).method
    if not isinstance(method, DynamicMethod):
        raise UserError(f"{type(method).__name__} has made its choice for good: only a dynamic one can be frozen")
    with frozen_history(model):
        without_head(model)(**model_inputs(model, batch))
    kept = {}
    for layer, units in kept_units(model).items():
        kept[layer, Block.ATTENTION], kept[layer, Block.MLP] = units.attention, units.mlp
    return FrozenOnText(method, kept)
