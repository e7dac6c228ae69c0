"""The weights of a model's layers spread over processes by FSDP2, which gives each layer its own while it runs."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from pp_lightning.errors import UserError
from pp_lightning.families import layers_of, stack_of
from pp_lightning.parallel import is_sharded
from pp_lightning.pruning import is_pruned, pruning_of
from pp_lightning.stored import is_settled, values_of


def shard_(model: PreTrainedModel, mesh: Any = None, *, trained: bool = False) -> None:
    """Leave each process a part of every layer's weights. There is no way back.

    A model is pruned statically before, and dynamically after this. Histories and slices are each process's own.

    Args:
        model: on the CPU, or on this process's device; the same in every process.
        mesh: a ``DeviceMesh`` of one dimension; None is all processes.
        trained: spread embeddings and head too, so that their gradients are averaged. The model must be called as a
            whole then. Otherwise they stay whole in every process, so that calibration can leave the head out.

    Raises:
        UserError: it is sharded already, its weights stay on disk, or layers choose for every batch already.
    """
    layers = layers_of(model)
    if is_sharded(layers[0]):
        raise UserError("the model is sharded already")
    if is_settled(layers[0]):
        raise UserError("weights that stay on disk are not sharded: load the model with --model.stream false")
    if is_pruned(model) and pruning_of(model).context is not None:
        raise UserError("layers choose for every batch already: shard_ the model first, prune_ it then")
    from torch.distributed.fsdp import fully_shard

    inside = {id(weight) for layer in layers for weight in layer.parameters()}
    outside: set[nn.Parameter] = {weight for weight in model.parameters() if id(weight) not in inside}
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    if trained:
        fully_shard(model, mesh=mesh)
    else:
        fully_shard(stack_of(model), mesh=mesh, ignored_params=outside)


@torch.no_grad()
def gathered(model: PreTrainedModel, *, holds: bool = True) -> PreTrainedModel | None:
    """The model itself, or of a sharded one a new model with all its weights, on the CPU. Every process must call this.

    Args:
        model: dense.
        holds: whether this process wants it; None for the others.
    """
    if not is_sharded(layers_of(model)[0]):
        return model if holds else None
    whole = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype) if holds else None
    for name, weight in model.named_parameters():
        values = values_of(weight)
        if whole is not None:
            whole.get_parameter(name).copy_(values)
    return whole
