"""The weights of a model's layers spread over processes by FSDP2, which gives each layer its own while it runs."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from pp_lightning.errors import UserError
from pp_lightning.families import layers_of, stack_of
from pp_lightning.parallel import is_sharded
from pp_lightning.pruning import is_pruned, pruning_of
from pp_lightning.stored import is_settled


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
