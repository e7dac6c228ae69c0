"""The tensors of an exported checkpoint, planned by name and shape and made one shard at a time."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pp_lightning.blocks import Block
from pp_lightning.errors import UserError
from pp_lightning.export.sizes import PrunedSizes
from pp_lightning.families import blocks_of, stack_path
from pp_lightning.functional.selection import unit_channels
from pp_lightning.stored import values_of

Shape = tuple[int, ...]
_AT_ONCE = 1 << 22  # numbers that are looked at together: to look takes as much memory again


@dataclass(frozen=True)
class Entry:
    """One tensor of the checkpoint.

    Attributes:
        source: the model's tensor; of a bias that the target class insists on, another one of its dtype.
        shape: as written, no smaller than the source.
        taken: rows of the source (n,) that are written, in order; None takes all.
        own: rows of the source by the role that they play, one after the other.
        rooms: rows as written by role, no fewer.
        absent: it is a bias that the model does not have.
    """

    name: str
    source: Tensor
    shape: Shape
    taken: Tensor | None = None
    own: Shape = ()
    rooms: Shape = ()
    absent: bool = False

    @property
    def placeholder(self) -> Tensor:
        """Shape and dtype without memory."""
        return torch.empty(self.shape, dtype=self.source.dtype, device="meta")

    def make(self) -> Tensor:
        """The tensor, on the CPU and contiguous: the source itself where nothing has to be added to it."""
        if self.absent:
            return torch.zeros(self.shape, dtype=self.source.dtype)
        source = values_of(self.source).detach()
        if not all(bool(torch.isfinite(some).all()) for some in source.flatten().split(_AT_ONCE)):
            raise UserError(
                f"the weight {self.name} is not finite: check the checkpoint, or export bfloat16 or float32"
            )
        if self.taken is not None:
            source = source.index_select(0, self.taken.to(source.device))
        if tuple(source.shape) == self.shape:
            return source.cpu().contiguous()
        whole = torch.zeros(self.shape, dtype=self.source.dtype)
        for rows, room in zip(source.split(self.own), whole.split(self.rooms), strict=True):
            room[tuple(slice(size) for size in rows.shape)] = rows  # padding goes behind: groups stay whole
        return whole


def entries_of(model: PreTrainedModel, sizes: PrunedSizes) -> list[Entry]:
    """Every tensor of a checkpoint of the model as it is, in its order; tied weights once."""
    places, found = _places(model), []
    for name, tensor in tensors_of(model).items():
        shape, place = tuple(tensor.shape), places.get(name)
        heads = sizes.key_heads.get(place.layer) if place and place.role in ("key", "value") else None
        taken = None if heads is None else unit_channels(heads, sizes.shape.head_size)
        own = () if place is None else place.rows
        if taken is not None:
            shape, own = (len(taken), *shape[1:]), (len(taken),)
        found.append(Entry(name, tensor, shape, taken, own, own))
    return found


def biases_to_come(model: PreTrainedModel, blocks: Collection[Block]) -> list[Entry]:
    """Biases that a method is going to give the outputs of these blocks, where there are none: names and shapes."""
    found, stack, held = [], ".".join(part for part in stack_path(model) if part), tensors_of(model)
    for (index, which), block in blocks_of(model).items():
        name = f"{stack}.{index}.{block.path_of(block.output)}.bias"
        if which in blocks and name not in held:
            weight = block.projection(block.output).weight
            rows = (weight.shape[0],)
            found.append(Entry(name, weight, rows, own=rows, rooms=rows, absent=True))
    return found


def held_by(holder: PreTrainedModel, entries: Iterable[Entry]) -> list[Entry] | None:
    """The entries as a model of other sizes holds them, with zeros behind what is narrower; None where it cannot."""
    room, places, found = tensors_of(holder), _places(holder), []
    for entry in entries:
        if entry.name not in room:
            return None
        shape = tuple(room.pop(entry.name).shape)
        fits = len(shape) == len(entry.shape) and all(a <= b for a, b in zip(entry.shape, shape, strict=True))
        place = places.get(entry.name)
        if shape != entry.shape and (place is None or not fits):
            return None
        found.append(replace(entry, shape=shape, rooms=() if place is None else place.rows))
    like = {entry.name: entry.source for entry in found}
    for name, tensor in room.items():
        weight = like.get(f"{name.removesuffix('.bias')}.weight")
        if weight is None:
            return None
        found.append(Entry(name, weight, tuple(tensor.shape), absent=True))
    return found


def tensors_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """What a checkpoint of a model holds, by name; tied weights once."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


class _Place(NamedTuple):
    """Where a tensor belongs that depends on the number of units.

    ``role`` is that of the projection, or ``head`` of a parameter that has one row a head; ``rows`` how many, role by
    role.
    """

    layer: int
    role: str
    rows: Shape


def _places(model: PreTrainedModel) -> dict[str, _Place]:
    found, stack = {}, ".".join(part for part in stack_path(model) if part)
    for (index, which), block in blocks_of(model).items():
        prefix, family = f"{stack}.{index}", block.family
        for name in block.names:
            parts = block.inputs.get(name)
            rows = tuple(part.rows for part in parts) if parts else (block.output_weight.shape[0],)
            for kind in ("weight", "bias"):
                found[f"{prefix}.{block.path_of(name)}.{kind}"] = _Place(index, block.role(name), rows)
        own = dict(block.module.named_parameters()) if which is Block.ATTENTION else {}
        for name in own.keys() & {*family.head_parameters, *family.key_parameters}:
            found[f"{prefix}.{block.path_of(name)}"] = _Place(index, "head", (len(own[name]),))
    return found
