"""Log-likelihoods of continuations under a causal language model, dense or pruned.

The decoder is run on the batch's inputs, and the vocabulary projection on the continuation's positions only. What a
question's rows have in common is run once, except under dynamic pruning that chooses on whole rows.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pp_lightning.commonsense.batching import RowBatch
from pp_lightning.commonsense.prefixes import continuation_states, with_prompts, worth_sharing
from pp_lightning.errors import UserError
from pp_lightning.families import longest_text, vocabulary_logits
from pp_lightning.pruning import is_pruned, pruning_of

ChooseOn = Literal["row", "context"]

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


def score_batch(model: PreTrainedModel, batch: RowBatch, *, choose_on: ChooseOn = "row") -> RowScores:
    """Score every row of a batch with a model in evaluation mode.

    Log-probabilities are float32, from float32 logits, and summed in float64. A dynamic method chooses on the rows, or
    (``context``) on all contexts of the batch without their last token: they fill a cache, and that token and the
    continuations are run under the choice that is held. Other models score the same under both.

    Raises:
        UserError: the model is not supported, its logits are not finite, or there is no context to choose on.
    """
    log_probabilities, _ = score_tokens(model, batch, choose_on=choose_on)
    return sum_rows(batch, log_probabilities)


@torch.no_grad()
def score_tokens(
    model: PreTrainedModel, batch: RowBatch, *, greedy: bool = False, choose_on: ChooseOn = "row"
) -> tuple[Tensor, Tensor | None]:
    """Score every continuation token of a batch.

    ``greedy`` also says where the token is the likeliest one of the vocabulary, which costs a pass over the logits.

    Returns:
        Log-probabilities, (K,) float32, and whether each token is the likeliest, (K,) bool or None; on the CPU.
    """
    targets = batch["targets"].to(model.device)
    predicting = _continuation_states(model, batch, choose_on)
    scores, hits = [], []
    parts = (tensor.split(_POSITIONS_AT_A_TIME) for tensor in (predicting, targets))
    for states, tokens in zip(*parts, strict=True):
        logits = vocabulary_logits(model, states)
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
    """Refuse a window that the model has no positions for."""
    longest = longest_text(model.config)
    if window > longest:
        raise UserError(f"a window of {window} tokens exceeds the {longest} positions of the model: use a smaller one")


def _continuation_states(model: PreTrainedModel, batch: RowBatch, choose_on: ChooseOn) -> Tensor:
    """What the vocabulary projection is applied to, (K, D).

    The decoder is called as a module, by the path that pruning hooks into, so a pruned model sees the batch begin.
    """
    decoder, device = model.base_model, model.device
    if chooses_per_batch(model):
        if choose_on == "context":
            return continuation_states(decoder, with_prompts(batch), device)
    elif worth_sharing(batch, model.config):
        return continuation_states(decoder, batch, device)
    inputs = {"input_ids": batch["input_ids"].to(device), "attention_mask": batch["attention_mask"].to(device)}
    hidden: Tensor = decoder(**inputs, use_cache=False).last_hidden_state
    return hidden[batch["row_input"][batch["target_row"]].to(device), batch["target_position"].to(device)]


def chooses_per_batch(model: PreTrainedModel) -> bool:
    """Whether a dynamic method prunes the model."""
    return is_pruned(model) and pruning_of(model).context is not None
