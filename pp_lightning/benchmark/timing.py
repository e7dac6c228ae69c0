"""Interleaved timing: in every round each runner has its turn, on the round's batch, so that drift hits all alike."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pp_lightning.benchmark.clock import Stopwatch, stopwatch_for
from pp_lightning.benchmark.settings import BenchmarkSettings
from pp_lightning.families import stack_of
from pp_lightning.progress import Tell
from pp_lightning.pruning import is_pruned, kept_units

# Runs on a batch by number, and gives the seconds of each part that it is made of.
Runner = Callable[[int], Mapping[str, float]]


@dataclass
class Samples:
    """What the timed rounds gave for one runner.

    Attributes:
        seconds: per part, one number a round.
        changed: share of the kept units that were not kept for the batch before, one number a round. Empty where
            nothing is chosen per batch.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    changed: list[float] = field(default_factory=list)


@torch.inference_mode()
def interleaved(
    runners: Mapping[str, Runner], *, rounds: int, batches: int, models: Mapping[str, PreTrainedModel]
) -> dict[str, Samples]:
    """Time all runners in turn.

    Round i takes batch i modulo ``batches``; the choices of ``models`` are watched.
    """
    samples = {name: Samples() for name in runners}
    before = {name: _choices(model) for name, model in models.items()}
    for turn in range(rounds):
        for name, run in runners.items():
            for part, seconds in run(turn % batches).items():
                samples[name].seconds.setdefault(part, []).append(seconds)
            if name in models:
                now = _choices(models[name])
                if now and before[name]:
                    samples[name].changed.append(_share_changed(before[name], now))
                before[name] = now
    return samples


def measured(
    what: str,
    runners: Mapping[str, Runner],
    watched: Mapping[str, PreTrainedModel],
    settings: BenchmarkSettings,
    tell: Tell,
) -> dict[str, Samples]:
    """Warm up, compiling what is to be compiled, then time.

    The choices of ``watched`` models are noted.
    """
    turns = partial(interleaved, runners, batches=settings.batches, models=watched)
    tell(f"{what}: warming up and compiling {len(runners)} variants")
    turns(rounds=settings.warmup)
    tell(f"{what}: {settings.repeats} rounds")
    return turns(rounds=settings.repeats)


def model_runner(model: PreTrainedModel, batches: Sequence[Tensor]) -> Runner:
    """Runs the whole model: ``decoder`` is all layers, ``model`` the projection to the vocabulary too."""
    clock = stopwatch_for(model.device)

    def end_of_decoder(*_: object) -> None:
        clock.mark()

    def run(index: int) -> Mapping[str, float]:
        hook = stack_of(model).register_forward_hook(end_of_decoder)
        try:
            clock.mark()
            model(input_ids=batches[index], use_cache=False)
            clock.mark()
        finally:
            hook.remove()
        decoder, vocabulary = clock.laps()
        return {"decoder": decoder, "model": decoder + vocabulary}

    return run


def part_runner(part: str, function: Callable[[int], object], clock: Stopwatch) -> Runner:
    """Runs a function of the batch's number, timed as one part."""

    def run(index: int) -> Mapping[str, float]:
        clock.mark()
        function(index)
        clock.mark()
        return {part: clock.laps()[0]}

    return run


def _choices(model: PreTrainedModel) -> list[Tensor]:
    if not is_pruned(model):
        return []
    return [kept for units in kept_units(model).values() for kept in (units.attention, units.mlp)]


def _share_changed(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Mean over blocks of the share of kept units that are new."""
    shares = [1.0 - float(torch.isin(new, old).float().mean()) for old, new in zip(before, after, strict=True)]
    return sum(shares) / len(shares)
