"""What the command line asks of any data that a model is evaluated on."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from transformers import PreTrainedTokenizerBase


class EvaluationData(L.LightningDataModule, ABC):
    """Data to evaluate on, with the text that pruning statistics are collected on.

    Attributes:
        window: tokens that the model is run on at most.
        batch_size: rows per batch.
    """

    window: int
    batch_size: int

    @abstractmethod
    def use_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Tokenise with ``tokenizer`` from now on; the model that is evaluated brings it."""

    @abstractmethod
    def calibration_batches(self) -> Sequence[Mapping[str, Any]]:
        """All calibration batches: ``input_ids`` and ``attention_mask``, (B, S)."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Settings and digests, for ``results.json``."""
