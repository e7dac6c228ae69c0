"""Decoding: one token a row at a time, on the choice that the prompt made."""

from collections.abc import Mapping, Sequence

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pp_lightning.benchmark.clock import stopwatch_for
from pp_lightning.benchmark.timing import Runner

PROMPT_TOKENS = 64


def decoding_runner(model: PreTrainedModel, prompts: Sequence[Tensor], new_tokens: int) -> Runner:
    """Decodes greedily after a prompt; the time is that of one token, the prompt's own left out.

    Args:
        model: dense or pruned.
        prompts: (B, S) each, one a batch.
        new_tokens: tokens to decode. The first one includes making the slices that are then held.
    """
    clock = stopwatch_for(model.device)

    def run(index: int) -> Mapping[str, float]:
        cache = DynamicCache(config=model.config)
        start = model(input_ids=prompts[index], past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = start.logits.argmax(-1)
        clock.mark()
        for _ in range(new_tokens):
            step = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = step.logits.argmax(-1)
        clock.mark()
        return {"decoding": clock.laps()[0] / new_tokens}

    return run
