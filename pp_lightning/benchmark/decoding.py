"""Decoding: one token a row at a time, on the choice that the prompt made."""

from collections.abc import Mapping, Sequence

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pp_lightning.benchmark.clock import stopwatch_for
from pp_lightning.benchmark.timing import Runner

PROMPT_TOKENS = 64


def decoding_runner(model: PreTrainedModel, prompts: Sequence[Tensor], new_tokens: int) -> Runner:
    """Decodes greedily after a prompt: ``prompt`` is the time of the prompt, ``decoding`` that of one token after it.

    Args:
        model: dense or pruned.
        prompts: (B, S) each, one a batch.
        new_tokens: tokens to decode. From the second prompt on, the slices for them are made along with the prompt; the
            first token after the first one makes its own.
    """
    clock = stopwatch_for(model.device)

    def run(index: int) -> Mapping[str, float]:
        cache = DynamicCache(config=model.config)
        clock.mark()
        start = model(input_ids=prompts[index], past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = start.logits.argmax(-1)
        clock.mark()
        for _ in range(new_tokens):
            step = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = step.logits.argmax(-1)
        clock.mark()
        prompt, decoding = clock.laps()
        return {"prompt": prompt, "decoding": decoding / new_tokens}

    return run
