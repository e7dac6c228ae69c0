"""Log-likelihoods of continuations under a causal language model, dense or pruned.

The decoder is run on the batch's inputs, and the vocabulary projection on the continuation's positions only.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pp_lightning.architectures import architecture_of
from pp_lightning.commonsense.batching import RowBatch
from pp_lightning.errors import UserError

# Positions projected at a time: the float32 logits of a 128k vocabulary then take 0.25 GB, whatever the batch.
_POSITIONS_AT_A_TIME = 512


class RowScores(NamedTuple):
    """Scores of a batch's rows, on the CPU.

    Attributes:
        log_likelihood: log-probabilities summed over the continuation, (R,) float64.
        tokens: tokens of the continuation, (R,) int64.
    """

    log_likelihood: Tensor
    tokens: Tensor


def score_batch(model: PreTrainedModel, batch: RowBatch) -> RowScores:
    """Score every row of a batch.

    Log-probabilities are float32, from float32 logits, and summed in float64.

    Args:
        model: LLaMA, Mistral, Qwen2, Qwen3 or OPT, in evaluation mode.
        batch: from :func:`~pp_lightning.commonsense.batching.collate_rows` or ``collate_questions``, on any device.

    Raises:
        UserError: the model is not supported, or its logits are not finite.
    """
    log_probabilities, _ = score_tokens(model, batch)
    return sum_rows(batch, log_probabilities)


@torch.no_grad()
def score_tokens(model: PreTrainedModel, batch: RowBatch, *, greedy: bool = False) -> tuple[Tensor, Tensor | None]:
    """Score every continuation token of a batch.

    Args:
        model: see :func:`score_batch`.
        batch: see :func:`score_batch`.
        greedy: also say where the token is the likeliest one of the vocabulary, which costs a pass over the logits.

    Returns:
        Log-probabilities, (K,) float32, and whether each token is the likeliest, (K,) bool or None; on the CPU.
    """
    device = model.device
    hidden = _hidden_states(model, batch)
    where = batch["row_input"][batch["target_row"]].to(device), batch["target_position"].to(device)
    targets = batch["targets"].to(device)
    head = model.get_output_embeddings()
    scores, hits = [], []
    for states, tokens in zip(
        hidden[where].split(_POSITIONS_AT_A_TIME), targets.split(_POSITIONS_AT_A_TIME), strict=True
    ):
        logits = head(states).float()
        scores.append(-torch.nn.functional.cross_entropy(logits, tokens, reduction="none"))
        if greedy:
            hits.append(logits.argmax(-1) == tokens)
    return torch.cat(scores).cpu(), torch.cat(hits).cpu() if greedy else None


def sum_rows(batch: RowBatch, log_probabilities: Tensor) -> RowScores:
    """Add up the log-probabilities (K,) of each row's tokens.

    Raises:
        UserError: one is not finite. A single NaN or infinite logit at a position shows in its log-probability, so
            this catches them without another pass over the vocabulary.
    """
    if not torch.isfinite(log_probabilities).all():
        raise UserError("the model's logits are not finite: check the checkpoint, or use float32 or bfloat16")
    rows = batch["target_row"].cpu()
    number = len(batch["row_input"])
    sums = torch.zeros(number, dtype=torch.float64).index_add_(0, rows, log_probabilities.double())
    return RowScores(sums, torch.bincount(rows, minlength=number))


def check_window(model: PreTrainedModel, window: int) -> None:
    """Refuse a window that the model has no positions for.

    Raises:
        UserError: ``window`` is larger than the config's ``max_position_embeddings``.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and window > longest:
        raise UserError(f"a window of {window} tokens exceeds the {longest} positions of the model: use a smaller one")


def _hidden_states(model: PreTrainedModel, batch: RowBatch) -> Tensor:
    """What the vocabulary projection is applied to, (I, S, D).

    The decoder is called as a module, by the path that pruning hooks into, so a pruned model sees the batch begin.
    """
    decoder = architecture_of(model.config).decoder_of(model)
    mask = batch["attention_mask"]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": mask}
    output = decoder(**{name: tensor.to(model.device) for name, tensor in inputs.items()}, use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden
