"""A prompt, then what follows it under the choice that it made: how generated text is scored."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pp_lightning.caches import CACHE
from pp_lightning.pruning import is_pruned, pruning_of


def continued_logits(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, prefix: int) -> Tensor:
    """Logits for the tokens behind a prompt, as the model gives them while it generates.

    The first ``prefix`` tokens fill a cache, and a dynamic method chooses by them alone; the others continue it. With
    ``refresh`` they do so in as many pieces as channels are chosen for, as they would one token at a time.

    Args:
        model: dense or pruned.
        input_ids: (B, S) int64.
        attention_mask: (B, S), 1 at real tokens, which the prompt has in every row; None is all.
        prefix: P, tokens of the prompt, at least 1 and less than S.

    Returns:
        (B, S - P + 1, V): the first predicts token P, the last the one after the end.
    """
    step = refresh_of(model) or input_ids.shape[1]
    found, cache = [], None
    for start, end in pieces(input_ids.shape[1], prefix, step):
        given: dict[str, Any] = {} if start else {"logits_to_keep": 1}
        mask = None if attention_mask is None else attention_mask[:, :end]
        out = model(input_ids=input_ids[:, start:end], attention_mask=mask, **{CACHE: cache}, use_cache=True, **given)
        cache = out[CACHE]
        found.append(out.logits[:, -1:] if not start else out.logits)
    return torch.cat(found, 1)


def pieces(tokens: int, prefix: int, step: int) -> list[tuple[int, int]]:
    """Where the prompt and the pieces behind it start and end."""
    return [(0, prefix), *((start, min(start + step, tokens)) for start in range(prefix, tokens, step))]


def refresh_of(model: PreTrainedModel) -> int | None:
    """Decoded tokens after which a model chooses channels again; None where it does not."""
    context = pruning_of(model).context if is_pruned(model) else None
    return None if context is None else context.refresh
