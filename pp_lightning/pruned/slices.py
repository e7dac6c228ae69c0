"""The weights of one block reduced to its kept units, and the memory that they are in."""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pp_lightning.functional.linear import wants_rows
from pp_lightning.functional.selection import Rows, take_rows
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
    in_graph = torch.compiler.is_compiling() and not torch.is_grad_enabled()
    if not in_graph or whole.device.type != "cpu":
        return take_rows(whole, kept, width, out)
    if out is None:
        rows: Tensor = gather_units(whole, kept, width)
        return rows
    gather_units_into_(out, whole, kept, width)
    return out


class Matrix(NamedTuple):
    """Weight (out, in) and bias (out,) of a linear map, whole or sliced."""

    weight: Tensor
    bias: Tensor | None


class Sliceable(Protocol):
    """A projection that a unit has rows in, or columns where it is the output.

    Attributes:
        name: inside its block.
        is_output: whether it leaves the block.
        rows: which of its rows belong to units; of no meaning for the output, whose columns do, one after the other.
    """

    name: str
    is_output: bool
    rows: tuple[Rows, ...]

    @property
    def matrix(self) -> Matrix:
        """The whole weight and bias."""


class SliceMemory:
    """Memory for one slice at a time, used again and again, shared by the blocks of a model.

    Fresh memory for every slice costs more than the copy itself where the system hands out pages that it has to clear
    first, as for a CPU; on an accelerator torch keeps freed memory at hand itself. The buffer has the size of the
    largest block's slice.
    """

    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        self._size = 0

    def reserve(self, size: int) -> None:
        """Tell that there will be slices of ``size`` elements. All blocks do so before the first slice is made."""
        self._size = max(self._size, size)

    def prepare(self, like: Tensor) -> None:
        """Make the buffer for slices of ``like``, unless there is one or fresh memory is as good."""
        buffer = self.buffer
        fits = buffer is not None and buffer.dtype == like.dtype and buffer.numel() >= self._size
        if like.device.type != "cpu":
            self.buffer = None
        elif not fits:
            self.buffer = None  # before the next one is made
            self.buffer = new_memory(self._size, like)

    def __getstate__(self) -> dict[str, object]:
        """Copies of a model start without a buffer."""
        return {**self.__dict__, "buffer": None}


def new_memory(size: int, like: Tensor) -> Tensor:
    """``size`` elements of the type of ``like``, made here but written wherever the next batch runs."""
    with torch.inference_mode(False):
        return torch.empty(size, dtype=like.dtype, device=like.device)


Slice = dict[str, Matrix]


class BlockSlices:
    """Slices the projections of one block, and keeps the slice that tokens after a prompt run on.

    A slice is in fresh memory while gradients are recorded, in memory that all blocks share for a batch on a CPU, and
    in memory of its own while its choice is held: CUDA graphs of decoding read everything where it was.

    Args:
        projections: those that a unit has rows (of the output: columns) in, the output last.
        keep: K, how many units a slice has.
        number: U, how many there are.
        memory: shared by the blocks of the model.

    Attributes:
        held: what tokens that continue the last batch run on; None where that was not asked for.
    """

    def __init__(self, projections: Sequence[Sliceable], keep: int, number: int, memory: SliceMemory) -> None:
        self.held: Slice | None = None
        self._projections = projections
        self._keep = keep
        self._number = number
        self._memory = memory
        self._own: Tensor | None = None
        self._size = sum(math.prod(shape) for one in projections for shape in self._shapes(one) if shape is not None)
        memory.reserve(self._size)

    def prepare(self, *, leaves: bool) -> None:
        """Before a batch, and outside of graphs: let go of what was held, and have memory for the next slice."""
        self.held = None
        if torch.is_grad_enabled() or not self._projections:
            return
        like = self._projections[-1].matrix.weight
        if leaves:
            self._make_own(like)
        else:
            self._memory.prepare(like)

    def of(self, choice: Choice, *, leaves: bool = False, output_alone: bool = False) -> Slice:
        """The projections reduced to the kept units.

        Args:
            choice: the kept units, and what the output's bias is to restore.
            leaves: write where :meth:`hold_left` finds it.
            output_alone: nothing but the output's projection.
        """
        buffer = self._own if leaves else self._memory.buffer
        if torch.is_grad_enabled() or (torch.compiler.is_exporting() and not leaves):  # graphs plan their own memory
            buffer = None
        return self._written(choice, self._projections[-1:] if output_alone else self._projections, buffer)

    def hold(self, choice: Choice) -> Slice:
        """What tokens after the last batch run on, sliced at the first of them."""
        if self.held is None:
            if self._projections and not torch.is_grad_enabled():
                self._make_own(self._projections[-1].matrix.weight)
            own = None if torch.is_grad_enabled() else self._own
            found = self._written(choice, self._projections, own)
            for one in self._projections[-1:]:
                if one.is_output and wants_rows(one.matrix.weight):
                    found[one.name] = Matrix(found[one.name].weight.contiguous(), found[one.name].bias)
            self.held = found
        return self.held

    def hold_left(self, choice: Choice) -> None:
        """Hold what the last batch, run on ``choice``, has left."""
        assert self._own is not None
        places = self._stretches(self._projections, self._own)
        self.held = {one.name: self._placed(one, choice, places[one.name]) for one in self._projections}

    def forget(self) -> None:
        """Let go of all slices: the weights have changed."""
        self.held = self._own = None

    def __getstate__(self) -> dict[str, object]:
        """Copies of a model make slices of their own."""
        return {**self.__dict__, "held": None, "_own": None}

    def _make_own(self, like: Tensor) -> None:
        if self._own is None or self._own.dtype != like.dtype:
            self._own = new_memory(self._size, like)

    def _shapes(self, one: Sliceable) -> tuple[tuple[int, int], tuple[int] | None]:
        """Of a sliced projection in memory, and of its bias. The output's columns are rows there."""
        (out, width), bias = one.matrix.weight.shape, one.matrix.bias
        if one.is_output:
            return (self._keep * (width // self._number), out), (out,)
        rows = sum(part.number if part.width == 0 else part.width * self._keep for part in one.rows)
        return (rows, width), None if bias is None else (rows,)

    def _stretches(self, projections: Sequence[Sliceable], buffer: Tensor) -> Slice:
        """Where each projection's slice lies in a buffer."""
        places, used = {}, 0
        for one in projections:
            found = []
            for shape in self._shapes(one):
                start, used = used, used if shape is None else used + math.prod(shape)
                found.append(None if shape is None else buffer[start:used].view(shape))
            weight, bias = found
            assert weight is not None
            places[one.name] = Matrix(weight, bias)
        return places

    def _written(self, choice: Choice, projections: Sequence[Sliceable], buffer: Tensor | None) -> Slice:
        places = None if buffer is None else self._stretches(projections, buffer)
        return {
            one.name: self._sliced(one, choice, None if places is None else places[one.name]) for one in projections
        }

    def _sliced(self, one: Sliceable, choice: Choice, place: Matrix | None) -> Matrix:
        """One projection's slice, in its place where it has one."""
        weight, bias = one.matrix
        into = Matrix(None, None) if place is None else place  # type: ignore[arg-type]
        if one.is_output:
            rows = gathered(weight.t(), choice.kept, weight.shape[1] // self._number, into.weight)
            total = _total(bias, choice.restored, weight.dtype)
        else:
            rows = _rows_of(weight, one.rows, choice.kept, into.weight)
            total = None if bias is None else _rows_of(bias, one.rows, choice.kept, None)
        if place is None:
            return Matrix(rows.t() if one.is_output else rows, total)
        if place.bias is not None and total is not None and total is not bias:
            place.bias.copy_(total)
        return self._placed(one, choice, place)

    def _placed(self, one: Sliceable, choice: Choice, place: Matrix) -> Matrix:
        """The slice that lies in a place."""
        if not one.is_output:
            return place
        own_bias = place.bias if choice.restored is not None else one.matrix.bias
        return Matrix(place.weight.t(), own_bias)


def _rows_of(whole: Tensor, rows: Sequence[Rows], kept: Tensor, place: Tensor | None) -> Tensor:
    """Rows (or entries) of the kept units, of every stretch of rows in turn."""
    take = gathered if whole.dim() == 2 else take_rows
    if len(rows) == 1:
        return take(whole, kept, rows[0].width, place)
    found, used = [], 0
    for start, number, width in rows:
        own = whole[start : start + number]
        size = number if width == 0 else len(kept) * width
        out = None if place is None else place[used : used + size]
        used += size
        found.append(own if width == 0 else take(own, kept, width, out))
    return torch.cat(found) if place is None else place


def _total(bias: Tensor | None, restored: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """An output's bias with what is restored added to it: it then costs nothing to add."""
    if restored is None:
        return bias
    return (restored if bias is None else bias.float() + restored).to(dtype)
