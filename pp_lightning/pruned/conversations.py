"""What a key/value cache was filled under hangs on it: several conversations go on side by side on one model."""

import math
from collections.abc import Sequence
from typing import Any, Self
from weakref import ref

import torch
from torch import Tensor

from pp_lightning.errors import UserError
from pp_lightning.functional.tracing import is_traced
from pp_lightning.pruned.choice import Choice
from pp_lightning.pruned.locks import Lock
from pp_lightning.pruned.refreshing import RecentInputs
from pp_lightning.pruned.slices import BlockSlices, Slice, new_memory

Room = Sequence[Tensor | None]  # memory for the slices of all blocks of one conversation


class Conversation:
    """The choice that a prompt was run under, for the tokens that continue its cache. Copies of the cache share it.

    Args:
        pruning: names one pruning of one model and its copies.
        maker: names the model or the copy.
        weights: digest of its weights: copies go on with each other's caches where these are the same.

    Attributes:
        choices: by block; empty while the prompt runs.
        held: slices by block: None of a block that has not been decoded with. None where they were let go.
        room: the memory that they are in.
        recent: what channels are chosen again from; None where they never are.
    """

    def __init__(self, pruning: str, maker: str, weights: str) -> None:
        self.pruning = pruning
        self.maker = maker
        self.weights = weights
        self.choices: list[Choice] = []
        self.held: list[Slice | None] | None = None
        self.room: Room | None = None
        self.recent: RecentInputs | None = None

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> "Conversation":
        return self if self.recent is None else self.branch(self.recent.copy())

    def branch(self, recent: RecentInputs) -> "Conversation":
        """One that goes on from here by itself, and may choose again."""
        branched = Conversation(self.pruning, self.maker, self.weights)
        branched.choices, branched.recent = list(self.choices), recent
        return branched

    def __getstate__(self) -> dict[str, object]:
        """A cache in a file takes its choice along, and no slices."""
        return {**self.__dict__, "held": None, "room": None}

    def slice_of(self, number: int, slices: BlockSlices) -> Slice:
        """What one block runs on: the slices that are held, or ones for this token."""
        held = self.held
        found = None if held is None else held[number]
        if found is None:
            room = None if self.room is None or is_traced() else self.room[number]
            found = slices.to_hold(self.choices[number], room)
            if held is not None and not torch.is_grad_enabled():
                held[number] = found
        return found


class HeldSlices:
    """The conversations of a model whose slices are in memory: so many, the least recently used is let go first.

    The memory of one that is gone is kept for the next; it counts too.

    Args:
        held_slices: how many conversations, or bytes as in ``"2GB"``.
    """

    def __init__(self, held_slices: int | str) -> None:
        self._given = held_slices
        self.most, self._bytes = _bound(held_slices)
        self._lock = Lock()
        self._recent: list[tuple[ref[Conversation], Room]] = []
        self._free: list[Room] = []

    def check(self, blocks: Sequence[BlockSlices]) -> None:
        """Turn bytes into conversations."""
        if self.most is None:
            of_one = sum(block.size * block.like.element_size() for block in blocks if block.like is not None)
            self.most = int(self._bytes // max(1, of_one))
            if self.most < 1:
                raise UserError(f"held_slices={self._given} is less than one conversation takes: {of_one / 1e6:.1f}MB")

    def use(self, one: Conversation, blocks: Sequence[BlockSlices]) -> None:
        """Have room for the slices of a conversation that goes on, or begins."""
        assert self.most is not None
        with self._lock.taken():
            self._sweep()
            entry = next((entry for entry in self._recent if entry[0]() is one), None)
            if entry is not None:
                self._recent.remove(entry)
                self._recent.append(entry)
                return
            while len(self._recent) >= self.most:
                self._let_go(self._recent.pop(0)[0]())
            fitting = [room for room in self._free if _fits(room, blocks)]
            room = fitting[0] if fitting else [_memory(block) for block in blocks]
            self._free = []
            one.room, one.held = room, [None] * len(blocks)
            self._recent.append((ref(one), room))

    @property
    def nbytes(self) -> int:
        """Bytes of all slices that are held, and of memory that is kept for the next."""
        with self._lock.taken():
            self._sweep()
            rooms = [*(room for _, room in self._recent), *self._free]
            return sum(memory.nbytes for room in rooms for memory in room if memory is not None)

    def forget(self) -> None:
        """Let go of all: weights have moved."""
        with self._lock.taken():
            for known, _ in self._recent:
                self._let_go(known())
            self._recent, self._free = [], []

    def _sweep(self) -> None:
        """Keep the memory of one conversation that is gone; nobody reads it any more."""
        assert self.most is not None
        gone = [room for known, room in self._recent if known() is None]
        self._recent = [entry for entry in self._recent if entry[0]() is not None]
        self._free = [*self._free, *gone][-1:] if len(self._recent) < self.most else []

    def _let_go(self, one: Conversation | None) -> None:
        if one is not None:  # a batch of another thread may still read its memory, so this is not used again
            one.held = one.room = None

    def __getstate__(self) -> dict[str, object]:
        """Copies of a model hold slices of their own."""
        return {**self.__dict__, "_recent": [], "_free": []}


def _memory(block: BlockSlices) -> Tensor | None:
    return None if block.like is None else new_memory(block.size, block.like)


def _fits(room: Room, blocks: Sequence[BlockSlices]) -> bool:
    return all(
        memory is None or (like is not None and memory.dtype == like.dtype and memory.device == like.device)
        for memory, like in zip(room, (block.like for block in blocks), strict=True)
    )


_UNITS = {"GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1}


def _bound(held_slices: int | str) -> tuple[int | None, float]:
    """Conversations and bytes that are held at most."""
    if isinstance(held_slices, int):
        if held_slices < 1:
            raise UserError(f"held_slices must be at least 1 conversation, not {held_slices}")
        return held_slices, math.inf
    unit = next((unit for unit in _UNITS if held_slices.upper().endswith(unit)), "")
    try:
        return None, float(held_slices[: len(held_slices) - len(unit)]) * _UNITS[unit]
    except (KeyError, ValueError):
        raise UserError(f"held_slices is a number of conversations, or bytes as in 2GB, not {held_slices!r}") from None


def has_fixed_size(cache: Any) -> bool:
    """Whether graphs can decode with a cache: it then has room for tokens to come, and its length is on the device."""
    return bool(getattr(cache, "is_compileable", False))


def conversation_of(cache: Any) -> Conversation | None:
    """What :func:`begin_with` left; None on a cache that no pruned model has filled, or that was emptied since."""
    found: Conversation | None = getattr(cache, "pruning_choice", None)
    return found


def begin_with(cache: Any, one: Conversation) -> None:
    """Note what a cache is being filled under.

    A cache of fixed size knows its length on the device alone. Whether it is filled is told by its conversation, so
    that emptying it has to take that away.
    """
    cache.pruning_choice = one
    if has_fixed_size(cache):
        cache.reset = _Reset(cache)


def is_filled(cache: Any) -> bool:
    """Whether a cache holds tokens. A look at the device is needed for one of fixed size without a conversation."""
    if has_fixed_size(cache) and conversation_of(cache) is not None:
        return True
    return bool(cache.get_seq_length() > 0)


class _Reset:
    """Stands in for a cache's ``reset``. It must not keep the cache alive, whose memory is large."""

    def __init__(self, cache: Any) -> None:
        self._cache = ref(cache)

    def __call__(self) -> None:
        cache = self._cache()
        assert cache is not None
        cache.pruning_choice = None
        type(cache).reset(cache)

    def __reduce__(self) -> tuple[type, tuple[Any]]:
        """A copy of the cache, or one in a file, has its own."""
        return _Reset, (self._cache(),)
