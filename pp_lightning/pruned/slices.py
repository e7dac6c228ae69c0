"""The weights of one block reduced to its kept units, and the memory that they are in."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pp_lightning.functional.linear import wants_rows
from pp_lightning.functional.selection import Rows, take_rows
from pp_lightning.functional.tracing import is_traced
from pp_lightning.pruned.choice import Choice


@torch.library.custom_op("pp_lightning::gather_units", mutates_args=())
def gather_units(whole: Tensor, kept: Tensor, width: int) -> Tensor:
    """:func:`take_rows` as one operator to a compiler: a CPU copies whole rows faster than generated loops do.

    Args:
        whole: (U * w, D), contiguous.
        kept: (K,) int64.
        width: w.

    Returns:
        (K * w, D).
    """
    return take_rows(whole, kept, width)


@gather_units.register_fake
def _(whole: Tensor, kept: Tensor, width: int) -> Tensor:
    return whole.new_empty(kept.shape[0] * width, whole.shape[1])


@torch.library.custom_op("pp_lightning::gather_units_into", mutates_args=("out",))
def gather_units_into_(out: Tensor, whole: Tensor, kept: Tensor, width: int) -> None:
    """:func:`gather_units` into memory that is there already: ``out`` (K * w, D), contiguous."""
    take_rows(whole, kept, width, out)


def gathered(whole: Tensor, kept: Tensor, width: int, out: Tensor | None) -> Tensor:
    """Rows of the kept units by the fastest way there is: see :func:`take_rows`."""
    if not is_traced() or whole.dim() == 1 or whole.device.type != "cpu" or torch.is_grad_enabled():
        units = whole.view(-1, width, *whole.shape[1:])
        if out is None:
            return units.index_select(0, kept).flatten(0, 1)
        torch.index_select(units, 0, kept, out=out.view(-1, *units.shape[1:]))
        return out
    if out is None:
        rows: Tensor = gather_units(whole, kept, width)
        return rows
    gather_units_into_(out, whole, kept, width)
    return out


class Matrix(NamedTuple):
    """Weight (out, in) and bias (out,) of a linear map, whole or sliced."""

    weight: Tensor
    bias: Tensor | None


Slice = dict[str, Matrix]


class SliceMemory:
    """Memory for one slice at a time, used again and again by the blocks of a model: one piece a running batch.

    Fresh memory for every slice costs more than the copy itself where the system hands out pages that it has to clear
    first, as for a CPU; on an accelerator torch keeps freed memory at hand itself. A piece has the size of the largest
    block's slice.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._size = 0

    def reserve(self, size: int) -> None:
        """Tell that there will be slices of ``size`` elements. All blocks do so before the first slice is made."""
        self._size = max(self._size, size)

    def take(self, like: Tensor) -> Tensor | None:
        """Memory for slices of ``like``; None where fresh memory is as good, or is needed for gradients."""
        if like.device.type != "cpu" or torch.is_grad_enabled() or is_traced():
            return None
        with suppress(IndexError):  # another thread may take the last one
            while True:
                buffer = self._free.pop()
                if buffer.dtype == like.dtype and buffer.numel() >= self._size:
                    return buffer
        return new_memory(self._size, like)

    @property
    def nbytes(self) -> int:
        """Bytes that wait for the next batch."""
        return sum(buffer.nbytes for buffer in self._free)

    def give_back(self, buffer: Tensor | None) -> None:
        """Take back what :meth:`take` gave. What is never given back is freed."""
        if buffer is not None:
            self._free.append(buffer)

    def __getstate__(self) -> dict[str, object]:
        """Copies of a model start without."""
        return {**self.__dict__, "_free": []}


def new_memory(size: int, like: Tensor) -> Tensor:
    """``size`` elements of the type of ``like``, made here but written wherever the next batch runs."""
    with torch.inference_mode(False):
        return torch.empty(size, dtype=like.dtype, device=like.device)


@dataclass(frozen=True)
class Sliceable:
    """A projection that units have rows in (of the output: columns), and where its slice lies in memory.

    Attributes:
        module: with ``weight`` (out, in) and ``bias``.
        rows: which of its rows belong to units; of the output the columns, as rows of its transpose.
        is_output: whether it leaves the block.
        shape: of the slice in memory; the output has its columns there.
        start: of the weight in memory.
        bias_start: of the bias there.
        end: of both.
    """

    name: str
    module: Any
    rows: tuple[Rows, ...]
    is_output: bool
    shape: tuple[int, int]
    start: int
    bias_start: int
    end: int


class BlockSlices:
    """Slices the projections of one block: into fresh memory, or where it is told.

    Attributes:
        size: elements of a slice.
    """

    def __init__(self, projections: Sequence[tuple[str, Any, tuple[Rows, ...]]], output: str, keep: int) -> None:
        self._layout: list[Sliceable] = []
        self.size = 0
        for name, module, rows in projections:
            number = sum(part.width * keep if part.width else part.number for part in rows)
            width = module.weight.shape[name != output]
            bias_start = self.size + number * width
            # an output may get a bias that it has not, for what is restored
            end = bias_start + (width if name == output else 0 if module.bias is None else number)
            self._layout.append(
                Sliceable(name, module, rows, name == output, (number, width), self.size, bias_start, end)
            )
            self.size = end

    @property
    def like(self) -> Tensor | None:
        """A weight that is sliced; None where none is."""
        return self._layout[-1].module.weight if self._layout else None

    def of(self, choice: Choice, buffer: Tensor | None = None, *, output_alone: bool = False) -> Slice:
        """The projections reduced to the kept units.

        Memory of another type or device than the slices' is left alone where ``buffer`` is it.
        """
        like = self.like
        if like is None or (buffer is not None and (buffer.dtype != like.dtype or buffer.device != like.device)):
            buffer = None
        if torch.is_grad_enabled():
            buffer = None
        found = {}
        for one in self._layout[-1:] if output_alone else self._layout:
            place = None if buffer is None else buffer[one.start : one.bias_start].view(one.shape)
            weight, bias = one.module.weight, one.module.bias
            if one.is_output:
                rows = gathered(weight.t(), choice.kept, one.rows[0].width, place).t()
                if choice.restored is not None:
                    bias = _restored(choice.restored, bias, weight.dtype, _bias_place(one, buffer))
            else:
                alone = one.rows[0].width if len(one.rows) == 1 else 0
                rows = (
                    gathered(weight, choice.kept, alone, place)
                    if alone
                    else _rows_of(weight, one.rows, choice.kept, place)
                )
                if bias is not None:
                    bias = _rows_of(bias, one.rows, choice.kept, _bias_place(one, buffer))
            found[one.name] = Matrix(rows, bias)
        return found

    def to_hold(self, choice: Choice, room: Tensor | None) -> Slice:
        """What tokens after a prompt run on, laid out for products with few tokens."""
        found = self.of(choice, room)
        for one in self._layout[-1:]:
            if one.is_output and wants_rows(one.module.weight):
                found[one.name] = Matrix(found[one.name].weight.contiguous(), found[one.name].bias)
        return found

    def written(self, choice: Choice, room: Tensor) -> Slice:
        """What a graph has written into ``room``: the slice for ``choice``."""
        found = {}
        for one in self._layout:
            weight, bias = room[one.start : one.bias_start].view(one.shape), one.module.bias
            if bias is not None if not one.is_output else choice.restored is not None:
                bias = _bias_place(one, room)
            found[one.name] = Matrix(weight.t() if one.is_output else weight, bias)
        return found


def _bias_place(one: Sliceable, buffer: Tensor | None) -> Tensor | None:
    return None if buffer is None else buffer[one.bias_start : one.end]


def _rows_of(whole: Tensor, rows: tuple[Rows, ...], kept: Tensor, place: Tensor | None) -> Tensor:
    """Rows (or entries) of the kept units, of every stretch of rows in turn."""
    if len(rows) == 1:
        return gathered(whole, kept, rows[0].width, place)
    found, used = [], 0
    for start, number, width in rows:
        own = whole[start : start + number]
        size = len(kept) * width if width else number
        out = None if place is None else place[used : used + size]
        used += size
        if width:
            found.append(gathered(own, kept, width, out))
        else:
            found.append(own if out is None else out.copy_(own))
    return torch.cat(found) if place is None else place


def _restored(restored: Tensor, bias: Tensor | None, dtype: torch.dtype, place: Tensor | None) -> Tensor:
    """An output's bias with what is restored added to it: it then costs nothing to add."""
    total = (restored if bias is None else bias.float() + restored).to(dtype)
    return total if place is None else place.copy_(total)
