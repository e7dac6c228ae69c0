"""Which choice a key/value cache was filled under, so that graphs can go on with it without a look at the data."""

from functools import partial
from typing import Any, Self


class ChoiceMark:
    """Hangs on the caches that are filled under one choice. Copies of a cache share it.

    Args:
        pruning: names one pruning of one model.

    Attributes:
        stands: whether the choice is still the model's. A graph of decoding depends on this, not on which choice it
            is, so that it serves all prompts.
    """

    def __init__(self, pruning: str) -> None:
        self.pruning = pruning
        self.stands = True

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self


def has_fixed_size(cache: Any) -> bool:
    """Whether graphs can decode with a cache: it then has room for tokens to come, and its length is on the device."""
    return bool(getattr(cache, "is_compileable", False))


def mark_of(cache: Any) -> ChoiceMark | None:
    """What :func:`put_mark` left; None on a cache that no pruned model has filled, or that was emptied since."""
    mark: ChoiceMark | None = getattr(cache, "pruning_choice", None)
    return mark


def put_mark(cache: Any, mark: ChoiceMark) -> None:
    """Note under which choice a cache is being filled.

    A cache of fixed size knows its length on the device alone. Whether it is filled is told by its mark, so that
    emptying it has to take the mark away.
    """
    cache.pruning_choice = mark
    if has_fixed_size(cache):
        cache.reset = partial(_reset, cache)


def is_filled(cache: Any) -> bool:
    """Whether a cache holds tokens. A look at the device is needed for one of fixed size that has no mark."""
    if has_fixed_size(cache) and mark_of(cache) is not None:
        return True
    return bool(cache.get_seq_length() > 0)


def _reset(cache: Any) -> None:
    cache.pruning_choice = None
    type(cache).reset(cache)
