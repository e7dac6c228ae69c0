"""Perplexity against a naive float64 reference, in half precision, and over two processes."""

import math
import os

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from pp_lightning.app.metrics import BatchMeanPerplexity, Perplexity, next_token_nll
from pp_lightning.errors import UserError

VOCABULARY = 17


def batch(seed: int, rows: int = 3, tokens: int = 8, padded: int = 0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, tokens, VOCABULARY, generator=generator)
    labels = torch.randint(0, VOCABULARY, (rows, tokens), generator=generator)
    if padded:
        labels[-1, -padded:] = -100
    return logits, labels


def naive_losses(logits, labels):
    losses = []
    for row, targets in zip(logits.double().tolist(), labels.tolist(), strict=True):
        for scores, target in zip(row[:-1], targets[1:], strict=True):
            if target >= 0:
                losses.append(math.log(sum(map(math.exp, scores))) - scores[target])
    return losses


def test_token_mean_weighs_every_token_alike():
    batches = [batch(0), batch(1, rows=1, padded=3), batch(2, padded=5)]
    metric = Perplexity()
    for logits, labels in batches:
        metric.update(logits, labels)
    losses = [loss for one in batches for loss in naive_losses(*one)]
    assert int(metric.tokens) == len(losses)
    assert float(metric.compute()) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)


def test_batch_mean_weighs_every_batch_alike():
    batches = [batch(0), batch(1, rows=1, padded=3)]
    metric, other = BatchMeanPerplexity(), Perplexity()
    for logits, labels in batches:
        metric.update(logits, labels)
        other.update(logits, labels)
    means = [sum(naive_losses(*one)) / len(naive_losses(*one)) for one in batches]
    assert float(metric.compute()) == pytest.approx(math.exp(sum(means) / 2), rel=1e-6)
    assert float(metric.compute()) != pytest.approx(float(other.compute()), rel=1e-4)


def test_half_precision_logits_are_scored_in_float32():
    logits = torch.zeros(1, 2, VOCABULARY, dtype=torch.float16)
    logits[0, 0, 3] = 60.0  # a probability of exp(-60) is 0 in float16, and its logarithm infinite
    nll, tokens = next_token_nll(logits, torch.tensor([[0, 5]]))
    assert int(tokens) == 1
    assert float(nll) == pytest.approx(60.0, rel=1e-6)
    assert nll.dtype == torch.float64


@pytest.mark.parametrize("metric", [Perplexity, BatchMeanPerplexity])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite(metric, value):
    logits, labels = batch(0)
    logits[1, 2, 3] = value
    with pytest.raises(UserError, match="logits are not finite"):
        metric().update(logits, labels)


def _one_of_two(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    metric = Perplexity()
    for index in range(rank, 5, 2):  # three batches here, two there
        metric.update(*batch(index))
    value = float(metric.compute())
    with open(os.path.join(folder, str(rank)), "w") as file:
        file.write(repr(value))
    dist.destroy_process_group()


def test_two_processes_give_what_one_gives(tmp_path):
    multiprocessing.start_processes(_one_of_two, args=(str(tmp_path),), nprocs=2, start_method="fork")
    alone = Perplexity()
    for index in range(5):
        alone.update(*batch(index))
    for rank in (0, 1):
        assert float((tmp_path / str(rank)).read_text()) == pytest.approx(float(alone.compute()), rel=1e-12)
