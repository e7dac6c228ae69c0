"""Cutting token sequences into windows and batches. Pure functions of their arguments.

Shapes: T tokens of a text, S tokens of a window, B rows of a batch.
"""

from collections.abc import Callable, Sequence
from typing import TypedDict, TypeVar

import torch
from torch import Tensor

from pp_lightning.errors import UserError

T = TypeVar("T")

IGNORED_LABEL = -100  # transformers' and torch's convention for "not predicted"


class Batch(TypedDict):
    """One batch: ``input_ids``, ``attention_mask`` (1 = real) and ``labels`` (-100 = not predicted), each (B, S)."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def contiguous_windows(tokens: Tensor, window: int) -> list[Tensor]:
    """Non-overlapping windows of ``tokens`` (T,) in order, the short last one included.

    A last window of a single token is left out: it has nothing to predict.
    """
    return [piece for piece in tokens.split(window) if len(piece) > 1]


def random_windows(tokens: Tensor, window: int, seed: int) -> list[Tensor]:
    """``floor(T / window)`` windows at random starts with replacement: the protocol of Probe Pruning's code."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(tokens) - window, (len(tokens) // window,), generator=generator)
    return [tokens[start : start + window] for start in starts.tolist()]


def shuffled(items: Sequence[T], seed: int) -> list[T]:
    """The same in a seeded random order."""
    generator = torch.Generator().manual_seed(seed)
    return [items[index] for index in torch.randperm(len(items), generator=generator).tolist()]


def document_windows(
    documents: Sequence[str], encode: Callable[[str], list[int]], window: int, samples: int, seed: int
) -> list[Tensor]:
    """``samples`` random windows of documents longer than the window, in a seeded random order of documents.

    Every document gives one window before any gives a second.

    Raises:
        UserError: no document has more than ``window`` tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    windows: list[Tensor] = []
    encoded: dict[int, list[int]] = {}  # few long documents give many windows
    while len(windows) < samples:
        before = len(windows)
        for index in torch.randperm(len(documents), generator=generator).tolist():
            tokens = encoded.get(index) or encoded.setdefault(index, encode(documents[index]))
            if len(tokens) <= window:
                continue
            start = int(torch.randint(0, len(tokens) - window, (1,), generator=generator))
            windows.append(torch.tensor(tokens[start : start + window]))
            if len(windows) == samples:
                return windows
        if len(windows) == before:
            raise UserError(
                f"none of the {len(documents)} calibration documents has more than {window} tokens: "
                "use longer documents or a smaller window"
            )
    return windows


def collate(windows: Sequence[Tensor], pad_id: int) -> Batch:
    """Stack windows (S_i,) into one right-padded batch; padding is masked out of attention and labels."""
    return collate_labelled([(window, window) for window in windows], pad_id)


def collate_labelled(rows: Sequence[tuple[Tensor, Tensor]], pad_id: int) -> Batch:
    """The same for rows of ids and labels, (S_i,) each."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([row for row, _ in rows], batch_first=True, padding_value=pad_id)
    labels = pad([row for _, row in rows], batch_first=True, padding_value=IGNORED_LABEL)
    lengths = torch.tensor([len(row) for row, _ in rows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return Batch(input_ids=ids, attention_mask=mask, labels=labels)


def batched(windows: Sequence[Tensor], batch_size: int, pad_id: int, *, drop_last: bool = False) -> list[Batch]:
    """Batches of ``batch_size`` rows in order; the last one may be smaller unless ``drop_last``."""
    groups = [windows[start : start + batch_size] for start in range(0, len(windows), batch_size)]
    if drop_last and groups and len(groups[-1]) < batch_size:
        groups.pop()
    return [collate(group, pad_id) for group in groups]
