"""The LightningDataModule for language modelling: evaluation windows, calibration windows, training windows."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pp_lightning.data.base import EvaluationData
from pp_lightning.data.training import TrainingRows
from pp_lightning.data.windows import IGNORED_LABEL, Batch, batched, contiguous_windows, random_windows, shuffled
from pp_lightning.errors import UserError
from pp_lightning.texts.sources import C4, TextSource, WikiText2

Protocol = Literal["contiguous", "paper", "continuation"]

_ORDERS: Mapping[Protocol, str] = {
    "contiguous": "as in the text",
    "paper": "random starts",
    "continuation": "random order of windows",
}


class LanguageModelling(EvaluationData):
    """Text cut into windows: one source to test on, one to calibrate on, and any number to train on.

    Args:
        text: the text to evaluate on: a file (.txt, .raw, .jsonl, .jsonl.gz, .parquet, .arrow), a data set of the hub
            (org/name), Embedded, or a class; none takes WikiText-2 from the hub.
        calibration: the text that the pruning statistics are collected on, named likewise; none takes C4 from the hub.
        train: texts to train on, packed end to end (naming one twice doubles its weight), or rows of another kind. Only
            ``fit`` and rows with recovery read them.
        window: tokens per window; none takes 1024, as the paper does for text, or all that the model has.
        batch_size: rows per batch. Dynamic pruning chooses per batch, so this is part of the result.
        calibration_samples: calibration windows; none takes 512 on an accelerator and 64 on a CPU. The paper uses 2000.
        protocol: ``contiguous`` (every token once, nothing dropped) or ``paper`` (random windows with replacement,
            last partial batch dropped, mean of batch means; only to stand beside the published numbers), or
            ``continuation`` (contiguous windows in random order, whose first part is a prompt: a dynamic method chooses
            by the prompts of a batch alone, its choice is held, and the rest of the windows is scored).
        prefix: tokens of the prompt under ``continuation``; none takes half of the window.
        seed: seed of every random draw made here.
        limit_tokens: evaluate on this many tokens from the start of the text; None takes all.

    Attributes:
        names_text: whether a text to evaluate on was named.
        distances: under ``continuation``, score the tokens at these distances behind the prompt, the first included and
            the last not; None is all.
    """

    def __init__(
        self,
        text: TextSource | None = None,
        calibration: TextSource | None = None,
        train: list[TextSource] | TrainingRows | None = None,
        window: int | None = None,
        batch_size: int = 20,
        calibration_samples: int | None = None,
        protocol: Protocol = "contiguous",
        prefix: int | None = None,
        seed: int = 0,
        limit_tokens: int | None = None,
    ) -> None:
        if limit_tokens is not None and limit_tokens < 2:
            raise UserError(f"limit_tokens must be at least 2, not {limit_tokens}: a token needs one in front of it")
        super().__init__(calibration or C4(), calibration_samples, window, batch_size, seed, train)
        self.text = text or WikiText2()
        self.names_text = text is not None
        if prefix is not None and protocol != "continuation":
            raise UserError(f"prefix is for --data.protocol continuation, not {protocol}: leave it out")
        self.protocol: Protocol = protocol
        self._prefix = prefix
        self._settle_prefix()
        self.distances: tuple[int, int] | None = None
        self.limit_tokens = limit_tokens

    def suit(self, positions: int, device: torch.device) -> None:
        """As for all data; a prompt is half of the window that comes out."""
        before = self.window
        super().suit(positions, device)
        if self.window != before:
            self._settle_prefix()

    def check_text(self) -> None:
        """Refuse a text that is not there."""
        self.text.check()

    def _settle_prefix(self) -> None:
        if self._prefix is not None and not 1 <= self._prefix < self.window:
            raise UserError(
                f"prefix must leave something of a window of {self.window} tokens to score, not {self._prefix}"
            )
        self.prefix = self.window // 2 if self._prefix is None else self._prefix

    def test_batches(self) -> list[Batch]:
        """All evaluation batches in order.

        Raises:
            UserError: the text is too short for one window of the protocol.
        """
        tokens = self._tokens_of(self.text)[: self.limit_tokens]
        needed = {"contiguous": 1, "paper": self.window * self.batch_size, "continuation": self.prefix}[self.protocol]
        if len(tokens) <= needed:
            raise UserError(
                f"the text has {len(tokens)} tokens and needs more than {needed}: use a longer text or a smaller window"
            )
        if self.protocol == "paper":
            windows = random_windows(tokens, self.window, self.seed)
            return batched(windows, self.batch_size, self._pad_id, drop_last=True)
        if self.protocol == "continuation":
            windows = [piece for piece in tokens.split(self.window) if len(piece) > self.prefix]
            # neighbours would tell each other of the text between them: rows of a batch are strangers
            batches = batched(shuffled(windows, self.seed), self.batch_size, self._pad_id)
            first, last = self.distances or (0, self.window)
            for batch in batches:
                batch["labels"][:, : self.prefix + first] = IGNORED_LABEL
                batch["labels"][:, self.prefix + last :] = IGNORED_LABEL
            return batches
        return batched(contiguous_windows(tokens, self.window), self.batch_size, self._pad_id)

    def val_dataloader(self) -> DataLoader[Batch]:
        """What ``fit`` reports its held-out loss on: held-out rows if there are any, else the evaluation text."""
        held_out = self.held_out_batches()
        return self._shared_out(held_out) if held_out else self.test_dataloader()

    def test_dataloader(self) -> DataLoader[Batch]:
        """This process's share of the evaluation batches: every batch once over all processes, none twice."""
        return self._shared_out(self.test_batches())

    def describe(self) -> dict[str, Any]:
        """Settings and text digests, for ``results.json``."""
        return {
            "window": self.window,
            "batch_size": self.batch_size,
            "protocol": self.protocol,
            "prefix": self.prefix if self.protocol == "continuation" else None,
            "seed": self.seed,
            "order": _ORDERS[self.protocol],
            "limit_tokens": self.limit_tokens,
            "text": self.text.describe(),
            "calibration": self.describe_calibration(),
        }

    def _shared_out(self, batches: Sequence[Batch]) -> DataLoader[Batch]:
        rank, world = self.processes()
        own = list(batches[rank::world])
        if self.in_step and len(own) < len(batches[::world]):
            own.append({**batches[-1], "labels": torch.full_like(batches[-1]["labels"], IGNORED_LABEL)})  # not scored
        return DataLoader(own, batch_size=None)  # type: ignore[arg-type]

    def _tokens_of(self, source: TextSource) -> Tensor:
        return torch.tensor(self._encode(source.text()))


def first_batch(data: EvaluationData) -> Batch:
    """The first evaluation batch of a text."""
    if not isinstance(data, LanguageModelling):
        raise UserError("this data has no text to freeze a choice on: use --data text")
    return data.test_batches()[0]
