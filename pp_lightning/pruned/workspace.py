"""One buffer that every block's slice is written into, one block after the other."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Where a slice of this shape, taken from this weight, is to be written; None lets torch allocate.
Memory = Callable[[tuple[int, int], Tensor], Tensor | None]


def fresh_memory(shape: tuple[int, int], like: Tensor) -> Tensor | None:
    """Leave it to torch: for slices that are held, and where memory cannot be reused."""
    return None


class SliceWorkspace:
    """Memory for the slice of one block at a time, shared by all blocks of a model.

    Fresh memory for every slice costs more than the copy itself where the system hands out pages that it has to clear
    first. The buffer grows to the largest block's slice and stays.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._used = 0

    def begin(self, like: Tensor, size: int) -> Memory:
        """Start a new slice of ``size`` elements; the previous one is overwritten.

        Memory is not reused while gradients are recorded, nor in compiled graphs, which plan their own.

        Args:
            like: a weight of the block.
            size: elements in the whole slice.
        """
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and like.requires_grad):
            return fresh_memory
        if not self._suits(like, size):
            self._buffer = None  # before the larger one is made
            self._buffer = torch.empty(size, dtype=like.dtype, device=like.device)
        self._used = 0
        return self._take

    def _suits(self, like: Tensor, size: int) -> bool:
        buffer = self._buffer
        if buffer is None or buffer.numel() < size or (buffer.dtype, buffer.device) != (like.dtype, like.device):
            return False
        return not buffer.is_inference() or torch.is_inference_mode_enabled()

    def _take(self, shape: tuple[int, int], like: Tensor) -> Tensor:
        assert self._buffer is not None
        start, self._used = self._used, self._used + math.prod(shape)
        return self._buffer[start : self._used].view(shape)

    def __deepcopy__(self, memo: dict[int, object]) -> "SliceWorkspace":
        """Copies of a model start with an empty workspace."""
        return SliceWorkspace()
