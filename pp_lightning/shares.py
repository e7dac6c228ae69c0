"""What one process has of a model that transformers spread over several (``tp_plan``): its heads and channels.

While a share is taken, the projections of blocks are plain Linears of this process's units, and output projections sum
over the processes (:class:`~pp_lightning.parallel.Reduced`). All that prunes then sees a smaller model. Nothing else of
the model changes, and giving the share back makes it what transformers has made of it.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pp_lightning.errors import UserError
from pp_lightning.families import BlockModules, blocks_of, layer_prefix, shape_of_model
from pp_lightning.interfaces import displaced_forward, replace_forward, restore_forward
from pp_lightning.parallel import Reduced, is_sharded, is_spread, own_part

_SHARE = "_pp_lightning_share"
_STYLES = {False: "colwise", True: "rowwise"}  # of projections into a block, and of its output


@dataclass(frozen=True)
class _Spread:
    """A projection as transformers has made it.

    Attributes:
        module: that it is.
        forward: what transformers lets it run.
        features: its outputs and inputs over all processes.
        weights: its distributed tensors without their values, by name: class, mesh, placements, shape and stride.
    """

    module: Any
    forward: Any
    features: tuple[int, int]
    weights: Mapping[str, tuple[Any, ...]]

    def put_back(self) -> None:
        """Make it that again, with the values that it has now."""
        module, own = self.module, displaced_forward(self.module)
        if isinstance(own, Reduced):
            module._parameters["bias"] = own.bias
        for name, (kind, mesh, placements, shape, stride) in self.weights.items():
            value = module._parameters[name]
            whole = kind.from_local(
                value.detach().contiguous(), mesh, placements, run_check=False, shape=shape, stride=stride
            )
            module._parameters[name] = nn.Parameter(whole, requires_grad=value.requires_grad)
        module.out_features, module.in_features = self.features
        restore_forward(module, self.forward)


@dataclass(frozen=True)
class Share:
    """The units of one process."""

    group: Any
    number: int
    _spread: tuple[_Spread, ...]

    def counted_by(self, scores: Tensor) -> Tensor:
        """Scores (U,) that all processes count units by: the mean of their best, of their second best, and so on.

        Counts made from these are the same in every process, so each keeps as many units as the others.
        """
        together = scores.sort().values.contiguous()
        torch.distributed.all_reduce(together, group=self.group)
        return together / self.number


def share_of(model: nn.Module) -> Share | None:
    """The share that is taken now."""
    found: Share | None = getattr(model, _SHARE, None)
    return found


def check_whole(model: nn.Module, what: str) -> None:
    """Refuse a model of which each process has a part."""
    if share_of(model) is not None or any(is_spread(weight) for weight in model.parameters()):
        raise UserError(f"several processes share the weights, and {what} needs all of them: do it in one process")


@contextmanager
def own_share(model: PreTrainedModel, *, for_good: bool = False) -> Iterator[Share | None]:
    """Within this context blocks have the units of this process alone; None where no other process has any.

    ``for_good`` gives the share back after a mistake alone, and otherwise when :func:`give_back` is called.
    """
    take_(model)
    kept = False
    try:
        yield share_of(model)
        kept = for_good
    finally:
        if not kept:
            give_back(model)


def take_(model: PreTrainedModel) -> None:
    """Take the share of this process, if it has one."""
    blocks = {key: one for key, one in blocks_of(model).items() if not is_sharded(one.layer)}
    outputs = [one.projection(one.output).weight for one in blocks.values()]
    mesh = next((weight.device_mesh for weight in outputs if is_spread(weight)), None)
    if mesh is None:
        return
    number = mesh.size()
    _check(model, blocks, number)
    spread = [
        _take(one.projection(name), mesh.get_group(), is_output=name == one.output)
        for one in blocks.values()
        for name in one.names
    ]
    setattr(model, _SHARE, Share(mesh.get_group(), number, tuple(spread)))


def give_back(model: PreTrainedModel) -> None:
    """Make the model what transformers has made of it; nothing where no share is taken."""
    share = share_of(model)
    if share is not None:
        for one in share._spread:
            one.put_back()
        delattr(model, _SHARE)


def keep_for_good(model: PreTrainedModel) -> None:
    """Forget how to give the share back, and with that the dense weights of blocks that were sliced."""
    share = share_of(model)
    if share is not None:
        setattr(model, _SHARE, replace(share, _spread=()))


def _check(model: PreTrainedModel, blocks: Mapping[Any, BlockModules], number: int) -> None:
    """Refuse what does not leave every process equally many units."""
    kind, plan, shape = model.config.model_type, model.tp_plan, shape_of_model(model)
    for (index, block), one in blocks.items():
        for name in one.names:
            path = re.sub(r"\.\d+(?=\.|$)", ".*", f"{layer_prefix(model, index)}.{one.path_of(name)}")
            style = plan.get(path, "not at all")
            if style != _STYLES[name == one.output] or not one.is_spread(name):
                raise UserError(
                    f"{name} in the {block.value} of {kind} is spread over processes {style!r}, not "
                    f"{_STYLES[name == one.output]!r}: prune it in one process, or under FSDP"
                )
    counts = {"heads": shape.num_heads, "key/value heads": shape.num_key_value_heads, "channels": shape.mlp_width}
    wrong = next((name for name, count in counts.items() if count % number), None)
    if wrong is not None:
        raise UserError(f"{number} processes cannot share {counts[wrong]} {wrong} evenly: take fewer")
    if shape.unknown is not None:
        raise UserError(f"layers of {kind} have parts beside heads and channels: prune it in one process")


def _take(module: Any, group: Any, *, is_output: bool) -> _Spread:
    """Make a projection a plain Linear of this process's rows, or columns."""
    spread = _Spread(
        module,
        displaced_forward(module),
        (module.out_features, module.in_features),
        {
            name: (type(one), one.device_mesh, one.placements, one.shape, one.stride())
            for name, one in module._parameters.items()
            if one is not None
        },
    )
    for name in spread.weights:
        whole = module._parameters[name]
        module._parameters[name] = nn.Parameter(own_part(whole).detach(), requires_grad=whole.requires_grad)
    module.out_features, module.in_features = module.weight.shape
    restore_forward(module)
    if is_output:
        bias, module.bias = module.bias, None
        replace_forward(module, Reduced(module, group, bias))
    return spread
