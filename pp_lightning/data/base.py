"""What all data that a model is evaluated on has in common: a tokenizer, and text to calibrate on."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from transformers import PreTrainedTokenizerBase

from pp_lightning.data.sources import TextSource
from pp_lightning.data.windows import batched, document_windows
from pp_lightning.errors import UserError


class EvaluationData(L.LightningDataModule, ABC):
    """Data to evaluate on, with the text that pruning statistics are collected on.

    Args:
        calibration: the text to calibrate on.
        calibration_samples: its windows.
        window: tokens that the model is run on at most, and of a calibration window.
        batch_size: rows per batch.
        seed: of every random draw made here.

    Raises:
        UserError: a size is impossible.
    """

    def __init__(
        self, calibration: TextSource, calibration_samples: int, window: int, batch_size: int, seed: int
    ) -> None:
        super().__init__()
        if window < 2 or batch_size < 1 or calibration_samples < 1:
            raise UserError("window must be at least 2, batch_size and calibration_samples at least 1")
        self.calibration = calibration
        self.calibration_samples = calibration_samples
        self.window = window
        self.batch_size = batch_size
        self.seed = seed
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._pad_id = 0

    def use_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Tokenise with ``tokenizer`` from now on; the model that is evaluated brings it."""
        self._tokenizer = tokenizer
        # Padding is masked everywhere, so any valid id will do where a tokenizer has none.
        self._pad_id = int(tokenizer.pad_token_id or 0)

    def calibration_batches(self) -> Sequence[Mapping[str, Any]]:
        """All calibration batches: random windows of documents longer than the window, (B, S) each.

        Raises:
            UserError: no document is long enough.
        """
        windows = document_windows(
            self.calibration.documents(), self._encode, self.window, self.calibration_samples, self.seed
        )
        return batched(windows, self.batch_size, self._pad_id)

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Settings and digests, for ``results.json``."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that :meth:`use_tokenizer` was given."""
        assert self._tokenizer is not None, "use_tokenizer comes first"
        return self._tokenizer

    def _encode(self, text: str) -> list[int]:
        # verbose=False: a text is longer than any context by design; the warning about it would mislead
        return list(self.tokenizer(text, verbose=False)["input_ids"])
