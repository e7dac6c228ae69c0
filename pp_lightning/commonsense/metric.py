"""Accuracy of multiple choice by likelihood, with standard errors, over any number of processes."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric

from pp_lightning.commonsense.batching import ChoiceBatch
from pp_lightning.commonsense.scoring import RowScores

ACCURACIES = ("acc", "acc_norm", "acc_token")


class MultipleChoice(Metric):
    """Fraction of questions whose right choice is the likeliest one, under three normalisations.

    ``acc`` compares summed log-likelihoods, ``acc_norm`` divides them by the characters of the choice, and
    ``acc_token`` by its tokens. The first of equal choices wins, as in lm-evaluation-harness. States are counts, so
    questions may be spread over processes and batches in any way.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    questions: Tensor
    rows: Tensor
    cut_rows: Tensor
    acc: Tensor
    acc_norm: Tensor
    acc_token: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("questions", "rows", "cut_rows", *ACCURACIES):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, scores: RowScores, batch: ChoiceBatch) -> None:
        """Count the questions of one batch."""
        owners, gold = batch["row_question"].cpu(), batch["gold"].cpu()
        normalisations = (torch.ones_like(scores.tokens), batch["row_characters"].cpu(), scores.tokens)
        for name, divisor in zip(ACCURACIES, normalisations, strict=True):
            chosen = choose(scores.log_likelihood / divisor, owners, len(gold))
            self._count(name, int((chosen == gold).sum()))
        self._count("questions", len(gold))
        self._count("rows", len(owners))
        self._count("cut_rows", int(batch["cut_rows"]))

    def compute(self) -> dict[str, float]:
        """Accuracies in [0, 1], their standard errors as ``<name>_stderr``, and the counts they rest on.

        The standard error is the harness's: sample standard deviation over the root of the number of questions. It is
        NaN for a single question.
        """
        number = int(self.questions)
        results: dict[str, float] = {"questions": number, "rows": int(self.rows), "cut_rows": int(self.cut_rows)}
        for name in ACCURACIES:
            accuracy = int(getattr(self, name)) / number if number else math.nan
            results[name] = accuracy
            results[f"{name}_stderr"] = accuracy_stderr(accuracy, number)
        return results

    def _count(self, name: str, number: int) -> None:
        setattr(self, name, getattr(self, name) + number)


def choose(scores: Tensor, owners: Tensor, questions: int) -> Tensor:
    """The best of each question's own rows, the first one among equals, (Q,) int64.

    Of scores (R,) of rows, and the question of each row, (R,) ascending.
    """
    counts = torch.bincount(owners, minlength=questions)
    first = counts.cumsum(0) - counts
    column = torch.arange(len(owners)) - first[owners]
    table = scores.new_full((questions, int(counts.max())), -math.inf)
    table[owners, column] = scores
    return table.argmax(1)  # torch documents that this is the first of equal maxima


def accuracy_stderr(accuracy: float, questions: int) -> float:
    """Standard error of a mean of zeros and ones: sample standard deviation / root of their number."""
    return math.sqrt(accuracy * (1 - accuracy) / (questions - 1)) if questions > 1 else math.nan
