"""Decoding: one token a row at a time, on the choice that the prompt made."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from pp_lightning.benchmark.clock import stopwatch_for
from pp_lightning.benchmark.model import BenchmarkModel
from pp_lightning.benchmark.rows import Row
from pp_lightning.benchmark.settings import Case, MeasuredDtype
from pp_lightning.benchmark.timing import Runner, measured
from pp_lightning.benchmark.variants import Variant, reference_of
from pp_lightning.blocks import ModelShape
from pp_lightning.caches import CACHE
from pp_lightning.compilation import CompileMode, torch_mode
from pp_lightning.families import shape_of
from pp_lightning.flops import continued_flops, prompt_flops
from pp_lightning.progress import Tell
from pp_lightning.pruning import Pruning, is_pruned, pruning_of


def decoding_rows(
    benchmarked: BenchmarkModel,
    models: Mapping[str, PreTrainedModel],
    variants: Mapping[str, Variant],
    dtype: MeasuredDtype,
    case: Case,
    tell: Tell,
) -> list[Row]:
    """A prompt and the tokens after it. Prompts are eager here, so that compiled variants have no row for them."""
    batch, prompt = case.rows, case.tokens
    settings, shape = benchmarked.settings, shape_of(benchmarked.model.config)
    prompts = benchmarked.batches(case)
    names = [
        n for n, variant in variants.items() if variant.decodes and (settings.decode_compiled or not variant.compiled)
    ]
    runners = {}
    for name in names:
        shapes = batch, prompt, settings.decode_tokens
        compiled = variants[name].compiled
        decoder = GraphDecoder(models[name], *shapes, settings.mode) if compiled else EagerDecoder(models[name])
        runners[name] = decoding_runner(decoder, prompts, settings.decode_tokens)
    what = f"{dtype}, decoding {settings.decode_tokens} tokens at batch {batch} after {prompt}"
    samples = measured(what, runners, {}, settings, tell)
    past = prompt + settings.decode_tokens // 2
    prunings = {name: pruning_of(models[name]) if is_pruned(models[name]) else None for name in names}
    parts = {
        "prompt": (prompt, {name: _prompt_flops(shape, one, case) for name, one in prunings.items()}),
        "decoding": (1, {name: continued_flops(shape, one, batch, past).model for name, one in prunings.items()}),
    }
    return [
        Row.timed(
            samples[name].seconds[part],
            samples[reference_of(variants[name])].seconds[part],
            tokens_a_round=batch * tokens_a_row,
            variant=name,
            part=part,
            dtype=dtype,
            rows=batch,
            tokens=prompt,
            pruning_ratio=benchmarked.ratio,
            flops_ratio=flops[name] / flops["dense"],
        )
        for part, (tokens_a_row, flops) in parts.items()
        for name in names
        if part == "decoding" or not variants[name].compiled
    ]


class EagerDecoder:
    """Decodes operator by operator, with a cache that grows."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def empty_cache(self) -> Cache:
        """A cache for the next prompt."""
        return DynamicCache(config=self.model.config)

    def logits(self, token: Tensor, cache: Cache, number: int) -> Tensor:
        """Logits (B, 1, V) after the tokens (B, 1) that are ``number`` tokens behind the prompt."""
        logits: Tensor = self.model(input_ids=token, **{CACHE: cache}, use_cache=True, logits_to_keep=1).logits
        return logits


class GraphDecoder(EagerDecoder):
    """The whole model in one graph, with a cache of fixed size: what ``generate`` does with it on accelerators."""

    def __init__(self, model: PreTrainedModel, rows: int, prompt: int, new_tokens: int, mode: CompileMode) -> None:
        super().__init__(model)
        device, room = model.device, prompt + new_tokens
        self._step = torch.compile(model.__call__, mode=torch_mode(mode), fullgraph=True, dynamic=False)
        self._cache = StaticCache(config=model.config, max_cache_len=room)
        self._positions = [torch.full((rows, 1), number, device=device) for number in range(prompt, room)]
        seen = torch.arange(room, device=device)
        self._masks = [(seen <= position[:, None, None]) for position in self._positions]

    def empty_cache(self) -> Cache:
        """The same one each time: graphs may have been recorded with its memory."""
        self._cache.reset()
        return self._cache

    def logits(self, token: Tensor, cache: Cache, number: int) -> Tensor:
        """The same in the graph."""
        place = {"position_ids": self._positions[number], "attention_mask": self._masks[number]}
        logits: Tensor = self._step(input_ids=token, **{CACHE: cache}, use_cache=True, **place).logits
        return logits


def decoding_runner(decoder: EagerDecoder, prompts: Sequence[Tensor], new_tokens: int) -> Runner:
    """Decodes greedily after a prompt: ``prompt`` is the time of the prompt, ``decoding`` that of one token after it.

    From the second prompt on, the slices for decoding are made along with the prompt; the first token after the first
    one makes its own.
    """
    model, clock = decoder.model, stopwatch_for(decoder.model.device)

    def run(index: int) -> Mapping[str, float]:
        cache = decoder.empty_cache()
        clock.mark()
        start = model(input_ids=prompts[index], **{CACHE: cache}, use_cache=True, logits_to_keep=1)
        token = start.logits.argmax(-1)
        clock.mark()
        for number in range(new_tokens):
            token = decoder.logits(token, cache, number).argmax(-1)
        clock.mark()
        prompt, decoding = clock.laps()
        return {"prompt": prompt, "decoding": decoding / new_tokens}

    return run


def _prompt_flops(shape: ModelShape, pruning: Pruning | None, case: Case) -> int:
    """A prompt whose last tokens alone are projected to the vocabulary."""
    flops = prompt_flops(shape, pruning, case.rows, case.tokens, sliced_anyway=True)
    return flops.layers + flops.outer + flops.vocabulary // case.tokens
