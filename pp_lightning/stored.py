"""Weights that stay on disk until their turn: parameters without memory that know where their values are.

A layer with such weights has them while it runs, or as long as somebody holds it (:func:`resident`); what was changed
meanwhile is written down and forgotten by :func:`keep`. Everything else that wants the numbers of one weight asks
:func:`values_of`, which a weight in memory answers with itself.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pp_lightning.errors import UserError
from pp_lightning.interfaces import give_memory_back, replace_forward, run_stock
from pp_lightning.parallel import is_sharded, is_spread
from pp_lightning.tensor_files import DTYPES, NAMES, Placeholder, write_tensors

_PLACE, _RESIDENCE = "_pp_lightning_place", "_pp_lightning_residence"


@dataclass(frozen=True)
class Place:
    """Where a tensor is."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self, take: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The tensor, or what is taken of it, in memory of its own.

        Args:
            take: of the tensor, which is a file mapped into memory: only what is taken is read.
        """
        with opened(self.file) as file:
            try:
                found: Tensor = file.get_tensor(self.name)
            except SafetensorError as error:
                raise UserError(f"cannot read {self.name} from {self.file}: {error}") from error
            return (found if take is None else take(found)).clone()

    def sample(self, step: int, number: int) -> Tensor:
        """Every so many-th number, so many of them at most: no more is read."""
        return self.read(partial(_every, 0, step, number))


@dataclass(frozen=True)
class Merged:
    """Where the parts are of a weight that a checkpoint has in several tensors, as it has those of experts.

    Attributes:
        parts: of each expert, the tensors (rows, D) that lie one below the other in it.
        shape: (experts, all rows, D).
    """

    parts: tuple[tuple[Place, ...], ...]
    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, by_kind: Sequence[Sequence[Place]]) -> "Merged":
        """Of the first kind's tensor of each expert, the second kind's, and so on."""
        parts = tuple(zip(*by_kind, strict=True))
        rows = sum(one.shape[0] for one in parts[0])
        return cls(parts, (len(parts), rows, *parts[0][0].shape[1:]), parts[0][0].dtype)

    def read(self) -> Tensor:
        """The weight, in memory of its own."""
        whole = torch.empty(self.shape, dtype=DTYPES[self.dtype])
        for expert, parts in zip(whole, self.parts, strict=True):
            for rows, part in zip(expert.split([one.shape[0] for one in parts]), parts, strict=True):
                rows.copy_(part.read())
        return whole

    def sample(self, step: int, number: int) -> Tensor:
        """Every so many-th number, so many of them at most: no more is read."""
        found: list[Tensor] = []
        start = 0
        for part in (part for parts in self.parts for part in parts):
            size, left = math.prod(part.shape), number - len(found)
            if (first := -start % step) < size and left > 0:
                found += part.read(partial(_every, first, step, left)).unbind()
            start += size
        return torch.stack(found)


AnyPlace = Place | Merged


def _every(first: int, step: int, number: int, whole: Tensor) -> Tensor:
    return whole.flatten()[first::step][:number]


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A file of safetensors, mapped into memory.

    Raises:
        UserError: it is gone, or cut off.
    """
    try:
        handle = safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    with handle as inside:
        yield inside


def stored(like: Tensor, place: AnyPlace) -> nn.Parameter:
    """A parameter of this shape and dtype without memory, whose values are at a place."""
    weight = nn.Parameter(torch.empty_like(like, device="meta"), requires_grad=like.requires_grad)
    setattr(weight, _PLACE, place)
    return weight


def at(place: Place) -> Tensor:
    """A tensor without memory, whose values are at a place."""
    return stored(torch.empty(place.shape, dtype=DTYPES[place.dtype], device="meta"), place)


def is_stored(weight: Tensor) -> bool:
    """Whether a weight has its values on disk."""
    return hasattr(weight, _PLACE)


def values_of(weight: Tensor) -> Tensor:
    """The weight itself; what the disk holds for it, in its dtype on the CPU; or what all processes hold of it."""
    place: AnyPlace | None = getattr(weight, _PLACE, None)
    if place is not None:
        return place.read().to(weight.dtype)
    if not is_spread(weight):
        return weight
    whole: Tensor = weight.full_tensor()  # type: ignore[attr-defined]
    return whole


def sample_of(weight: Tensor, step: int, number: int) -> Tensor:
    """Every ``step``-th number of a weight, ``number`` at most: (n,) in its dtype. Of a stored one no more is read."""
    place: AnyPlace | None = getattr(weight, _PLACE, None)
    if place is None:
        return values_of(weight).detach().flatten()[::step][:number]
    return place.sample(step, number).to(weight.dtype)


class Residence:
    """How the stored weights of one layer come and go."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self._users = 0
        self._away: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._device = torch.device("cpu")

    def __enter__(self) -> Self:
        self._users += 1
        if self._users == 1:
            self._fetch()
        return self

    def __exit__(self, *_: object) -> None:
        self._users -= 1
        if self._users == 0:
            for module, name, weight in self._away:
                module._parameters[name] = weight
            self._away.clear()
            give_memory_back()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the layer's ``forward``."""
        with self:
            return run_stock(self._layer, *args, **kwargs)

    def apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Stands in for what moves the layer to a device: that is where its weights are going to be."""
        self._device = function(torch.empty(0)).device
        return self._layer

    def _fetch(self) -> None:
        for module in self._layer.modules():
            for name, weight in module._parameters.items():
                if weight is not None and is_stored(weight):
                    self._away.append((module, name, weight))
        for module, name, weight in self._away:
            values = values_of(weight).to(self._device)
            if values.stride() != weight.stride():  # laid out for those who slice it
                values = torch.empty_like(weight, device=self._device).copy_(values)
            module._parameters[name] = nn.Parameter(values, requires_grad=weight.requires_grad)


def settle(layer: nn.Module) -> None:
    """Let the stored weights of a layer come when it runs, and go afterwards."""
    residence = Residence(layer)
    setattr(layer, _RESIDENCE, residence)
    replace_forward(layer, residence.run)
    layer._apply = residence.apply  # type: ignore[method-assign]


def is_settled(layer: nn.Module) -> bool:
    """Whether a layer's weights come and go."""
    return hasattr(layer, _RESIDENCE)


@contextmanager
def resident(layer: nn.Module) -> Iterator[None]:
    """Within this context a layer has its weights in memory, wherever they are otherwise."""
    if is_sharded(layer):
        layer.unshard()  # type: ignore[operator]
        try:
            yield
        finally:
            layer.reshard()  # type: ignore[operator]
        return
    residence: Residence | None = getattr(layer, _RESIDENCE, None)
    if residence is None:
        yield
        return
    with residence:
        yield


def keep(layer: nn.Module, file: Path, about: str = "") -> None:
    """Write those of a layer's weights that are in memory alone, and forget them.

    A finished ``file`` that says the same ``about`` itself is not written again.
    """
    own = {name: weight for name, weight in layer.named_parameters() if not weight.is_meta}
    if not own:
        return
    if described(file) != about or not about:
        write_whole(file, own, {"about": about})
    for name, weight in own.items():
        path, _, leaf = name.rpartition(".")
        place = Place(file, name, tuple(weight.shape), NAMES[weight.dtype])
        layer.get_submodule(path)._parameters[leaf] = stored(weight, place)


def described(file: Path) -> str | None:
    """What a finished file says about itself; None where there is none."""
    if not file.exists():
        return None
    try:
        with opened(file) as inside:
            return str((inside.metadata() or {}).get("about", ""))
    except UserError:
        return None


def write_whole(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], what: str = "weights") -> None:
    """Write a file of safetensors; it appears, or replaces an old one, when it is complete."""
    unfinished = file.with_name(f".{file.name}.unfinished")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        places = {name: Placeholder(tensor, partial(_detached, tensor)) for name, tensor in tensors.items()}
        write_tensors(places, unfinished, metadata)
        unfinished.replace(file)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise UserError(f"cannot write {what} to {file}: {error.strerror or error}") from error


def _detached(tensor: Tensor) -> Tensor:
    return values_of(tensor).detach()


def places_in(folder: Path) -> dict[str, Place]:
    """Where each tensor of a checkpoint folder is."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    files: Iterable[str] = [single.name]
    if index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    elif not single.is_file():
        raise UserError(f"{folder} has no model.safetensors: only safetensors can be streamed")
    return {name: place for file in files for name, place in places_of(folder / file).items()}


def places_of(file: Path) -> dict[str, Place]:
    """Where each tensor of a file of safetensors is.

    Raises:
        UserError: it is missing or cut off.
    """
    found = {}
    with opened(file) as inside:
        for key in inside.keys():  # noqa: SIM118 (not a dict)
            one = inside.get_slice(key)
            found[key] = Place(file, key, tuple(one.get_shape()), one.get_dtype())
    return found
