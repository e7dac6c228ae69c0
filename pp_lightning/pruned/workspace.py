"""Memory for slices that is used again and again."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Where a slice of this shape, taken from this weight, is to be written; None lets torch allocate.
Memory = Callable[[tuple[int, int], Tensor], Tensor | None]


def fresh_memory(shape: tuple[int, int], like: Tensor) -> Tensor | None:
    """Leave it to torch: where memory cannot be reused."""
    return None


class SliceWorkspace:
    """Memory for one slice at a time: of all blocks in turn, or of one block while its choice is held.

    Fresh memory for every slice costs more than the copy itself where the system hands out pages that it has to clear
    first, as for a CPU; on an accelerator torch keeps freed memory at hand itself. The buffer has the size of the
    largest block's slice.

    Args:
        outlives_batch: slices are looked for after the batch, so that they have to be here on every device.

    Attributes:
        buffer: the memory, made by :meth:`prepare`; None where slices get fresh memory.
    """

    def __init__(self, *, outlives_batch: bool = False) -> None:
        self.outlives_batch = outlives_batch
        self.buffer: Tensor | None = None
        self._size = 0

    def reserve(self, size: int) -> None:
        """Tell that there will be slices of ``size`` elements. All blocks do so before the first slice is made."""
        self._size = max(self._size, size)

    def prepare(self, like: Tensor) -> None:
        """Make the buffer where there is none yet for slices of ``like``. Not for graphs: they are given the buffer."""
        if torch.is_grad_enabled() or self._suits(like):
            return
        self.buffer = None  # before the next one is made
        if self.outlives_batch or like.device.type == "cpu":
            with torch.inference_mode(False):  # made here, but written wherever the next batch runs
                self.buffer = torch.empty(self._size, dtype=like.dtype, device=like.device)

    def begin(self, like: Tensor) -> Memory:
        """Start a new slice; the previous one is overwritten.

        Memory is not reused while gradients are recorded. Graphs for other tools plan their own, except for a slice
        that outlives the batch.

        Args:
            like: a weight of the block.
        """
        plans_its_own = torch.compiler.is_exporting() and not self.outlives_batch
        if self.buffer is None or plans_its_own or torch.is_grad_enabled() or not self._suits(like):
            return fresh_memory
        return _Stretches(self.buffer)

    def _suits(self, like: Tensor) -> bool:
        buffer = self.buffer
        return (
            buffer is not None
            and buffer.numel() >= self._size
            and (buffer.dtype, buffer.device) == (like.dtype, like.device)
        )

    def __deepcopy__(self, memo: dict[int, object]) -> "SliceWorkspace":
        """Copies of a model start with an empty workspace."""
        copied = SliceWorkspace(outlives_batch=self.outlives_batch)
        copied.reserve(self._size)
        return copied


class _Stretches:
    """Hands out one stretch of a buffer after the other."""

    def __init__(self, buffer: Tensor) -> None:
        self._buffer = buffer
        self._used = 0

    def __call__(self, shape: tuple[int, int], like: Tensor) -> Tensor:
        start, self._used = self._used, self._used + math.prod(shape)
        return self._buffer[start : self._used].view(shape)
