"""Perplexity as torchmetrics metrics: float32 losses, float64 sums, reduced over processes."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from pp_lightning.data.windows import IGNORED_LABEL
from pp_lightning.errors import UserError


def next_token_nll(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the losses of the next tokens (float64, 0-d), and how many are predicted (int64, 0-d).

    Of logits (B, S, V) and labels (B, S), -100 where nothing is predicted. Losses are float32, made row by row so that
    no float32 copy of all logits exists.
    """
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for row, targets in zip(logits, labels, strict=True):
        losses = F.cross_entropy(row[:-1].float(), targets[1:], ignore_index=IGNORED_LABEL, reduction="none")
        total += losses.double().sum()
    return total, (labels[:, 1:] != IGNORED_LABEL).sum()


class Perplexity(Metric):
    """``exp(total NLL / predicted tokens)`` over all batches and processes: the ``contiguous`` protocol."""

    full_state_update = False
    higher_is_better = False
    nll: Tensor
    batches: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("batches", "tokens"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits (B, S, V), labels (B, S); one without a predicted token is run for other processes."""
        nll, tokens = next_token_nll(logits, labels)
        if not torch.isfinite(nll):
            raise UserError(
                "the model's logits are not finite: check the checkpoint, or evaluate in --model.dtype float32 or "
                "bfloat16"
            )
        if tokens > 0:
            self.nll += self.summed(nll, tokens)
            self.batches += 1
            self.tokens += tokens

    def summed(self, nll: Tensor, tokens: Tensor) -> Tensor:
        """What is added up of a batch's total NLL."""
        return nll

    def compute(self) -> Tensor:
        """Perplexity, float64, 0-d."""
        return (self.nll / self.tokens).exp()


class BatchMeanPerplexity(Perplexity):
    """``exp(mean over batches of the batch's mean loss)``: the published code's, for the ``paper`` protocol only."""

    def summed(self, nll: Tensor, tokens: Tensor) -> Tensor:
        """A batch's mean loss."""
        return nll / tokens

    def compute(self) -> Tensor:
        """Perplexity, float64, 0-d."""
        return (self.nll / self.batches).exp()
