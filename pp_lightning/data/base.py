"""What all data that a model is evaluated on has in common: a tokenizer, and text to calibrate on."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pp_lightning.data.order import Row, ShuffledBatches
from pp_lightning.data.training import Packed, TrainingRows
from pp_lightning.data.windows import Batch, batched, collate_labelled, document_windows
from pp_lightning.errors import UserError
from pp_lightning.texts.sources import TextSource

PAPER_SAMPLES = 2000  # windows, in the paper
_SAMPLES = {"cpu": 64}  # by kind of device: what a person waits for
_SAMPLES_ELSEWHERE = 512


def check_positions(window: int, positions: int) -> None:
    """Refuse a window that a model of so many positions has no room for."""
    if window > positions:
        raise UserError(f"windows of {window} tokens exceed the model's {positions} positions: lower --data.window")


def samples_for(device: torch.device) -> int:
    """Calibration windows where nobody says how many: few on a CPU, more on an accelerator."""
    return _SAMPLES.get(device.type, _SAMPLES_ELSEWHERE)


class EvaluationData(L.LightningDataModule, ABC):
    """Data to evaluate on, with the text that pruning statistics are collected on.

    Sizes that are None are settled by :meth:`suit`.
    """

    usual_window: ClassVar[int] = 1024

    def __init__(
        self,
        calibration: TextSource,
        calibration_samples: int | None,
        window: int | None,
        batch_size: int,
        seed: int,
        train: list[TextSource] | TrainingRows | None = None,
    ) -> None:
        super().__init__()
        sizes = (("window", window, 2), ("batch_size", batch_size, 1), ("calibration_samples", calibration_samples, 1))
        for name, size, least in sizes:
            if size is not None and size < least:
                raise UserError(f"{name} must be at least {least}, not {size}")
        if not 0 <= seed < 2**63:
            raise UserError(f"seed must be from 0 to 2^63 - 1, not {seed}")
        self.calibration = calibration
        self._samples, self._window = calibration_samples, window
        self.calibration_samples = calibration_samples or samples_for(torch.device("cpu"))
        self.window = window or self.usual_window
        self.batch_size = batch_size
        self.seed = seed
        self.train = train if isinstance(train, TrainingRows) else Packed(train) if train else None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._vocabulary: int | None = None
        self._pad_id = 0
        self._rows: list[Row] | None = None
        self._calibration_read = False
        self._windows: dict[tuple[int, int, int], list[Tensor]] = {}

    def suit(self, positions: int, device: torch.device) -> None:
        """Take what nobody asked for by the model and where it runs."""
        if self._window is not None:
            check_positions(self.window, positions)
        self.window = min(self.window, positions)
        self.calibration_samples = self._samples or samples_for(device)

    def use_tokenizer(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int | None = None) -> None:
        """Tokenise with ``tokenizer`` from now on; the model that is evaluated brings it.

        ``vocabulary`` is how many tokens that model knows; None does not ask.
        """
        if tokenizer is not self._tokenizer:
            self._rows = None
            self._windows.clear()
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        # Padding is masked everywhere, so any valid id will do where a tokenizer has none.
        self._pad_id = int(tokenizer.pad_token_id or 0)

    def check_text(self) -> None:
        """Refuse a text to evaluate on that is not there, before any work."""

    def calibration_batches(
        self, samples: int | None = None, window: int | None = None, batch_size: int | None = None
    ) -> Sequence[Mapping[str, Any]]:
        """All calibration batches: random windows of documents longer than the window, (B, S) each.

        None takes the data's own sizes; ``window`` is never more than the data's.

        Raises:
            UserError: no document is long enough.
        """
        length = min(window or self.window, self.window)
        number = samples or self.calibration_samples
        self._calibration_read = True
        asked = (length, number, self.seed)
        if asked not in self._windows:  # methods read them again: a text is cut once
            documents = self.calibration.documents()
            self._windows = {asked: document_windows(documents, self._encode, length, number, self.seed)}
        return batched(self._windows[asked], batch_size or self.batch_size, self._pad_id)

    def describe_calibration(self) -> dict[str, Any] | None:
        """Number of windows and digest of the calibration text, for ``results.json``; None where nothing read it."""
        if not self._calibration_read:
            return None
        return {"samples": self.calibration_samples, "seed": self.seed, **self.calibration.describe()}

    def train_dataloader(self) -> ShuffledBatches:
        """This process's share of the training rows, shuffled.

        Raises:
            UserError: there is no training text, or too little.
        """
        rows, (rank, world) = self._training_rows()[self._training().held_out :], self.processes()
        accumulate = self.trainer.accumulate_grad_batches if self.trainer else 1
        batch_size = self._training().batch_size or self.batch_size
        needed = batch_size * world * accumulate
        if len(rows) < needed:
            raise UserError(f"there are {len(rows)} rows to train on and one step takes {needed}: use more text")
        return ShuffledBatches(
            rows, batch_size, self._pad_id, seed=self.seed, rank=rank, world=world, accumulate=accumulate
        )

    def held_out_batches(self) -> list[Batch]:
        """The training rows that are kept from training, in batches; empty where there are none."""
        training = self._training()
        rows = self._training_rows()[: training.held_out]
        size = training.batch_size or self.batch_size
        return [collate_labelled(rows[start : start + size], self._pad_id) for start in range(0, len(rows), size)]

    @property
    def train_window(self) -> int:
        """Tokens of a training row at most."""
        return self._training().window or self.window

    def processes(self) -> tuple[int, int]:
        """Which part of the data is this process's, and how many parts there are: processes may share a model."""
        if self.trainer is None:
            return 0, 1
        mesh = self._mesh
        if mesh is None:
            return self.trainer.global_rank, self.trainer.world_size
        return mesh["data_parallel"].get_local_rank(), mesh["data_parallel"].size()

    @property
    def group(self) -> Any:
        """The processes with other parts of the data; None is all of them."""
        return None if self._mesh is None else self._mesh["data_parallel"].get_group()

    @property
    def in_step(self) -> bool:
        """Whether all processes must run equally many batches: they give each other weights while they do."""
        return self._mesh is not None

    @property
    def _mesh(self) -> Any:
        """Of processes that share a model, as Lightning's ``ModelParallelStrategy`` makes it."""
        module = None if self.trainer is None else getattr(self.trainer, "lightning_module", None)
        return None if module is None else module.device_mesh

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Settings and digests, for ``results.json``."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that :meth:`use_tokenizer` was given."""
        assert self._tokenizer is not None, "use_tokenizer comes first"
        return self._tokenizer

    def _training(self) -> TrainingRows:
        if self.train is None:
            raise UserError("no training text: name at least one source in --data.train")
        return self.train

    def _training_rows(self) -> list[Row]:
        if self._rows is None:
            self._rows = self._training().rows(self._encode, self.train_window, self.tokenizer.eos_token_id)
        return self._rows

    def _encode(self, text: str) -> list[int]:
        # verbose=False: a text is longer than any context by design; the warning about it would mislead
        return self._known(list(self.tokenizer(text, verbose=False)["input_ids"]))

    def _known(self, ids: list[int]) -> list[int]:
        """The same ids; one that the model has no embedding of is refused."""
        highest = max(ids, default=0)
        if self._vocabulary is not None and highest >= self._vocabulary:
            raise UserError(
                f"the text has token {highest}, and the model has {self._vocabulary} tokens: "
                "its tokenizer belongs to another model"
            )
        return ids
