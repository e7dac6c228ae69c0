"""From how many tokens on a probe of a prompt pays: measured on the model at hand, for ``prefill="auto"``."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pp_lightning.benchmark.clock import stopwatch_for
from pp_lightning.benchmark.model import BenchmarkModel
from pp_lightning.benchmark.settings import BenchmarkSettings, Case
from pp_lightning.benchmark.timing import Runner, measured
from pp_lightning.benchmark.variants import VARIANTS, Variant
from pp_lightning.caches import CACHE
from pp_lightning.errors import UserError
from pp_lightning.methods import ProbePruning
from pp_lightning.prefill import BreakEven, break_even_file
from pp_lightning.progress import Tell
from pp_lightning.records import check_place, environment, write_json

_SIZES = (16, 32, 64, 128, 256, 512, 768, 1024, 1536, 2048, 4096, 8192)


def write_break_even(settings: BenchmarkSettings, out: Path, tell: Tell = print) -> str:
    """Measure from where on a probe pays and write it: beside the statistics, or into a folder where there are none."""
    file = out / "break-even.json" if settings.statistics is None else break_even_file(settings.statistics)
    check_place(file.parent)
    found = measure_break_even(settings, tell)
    write_json(file, found.as_dict())
    lines = []
    for tokens, seconds in found.seconds.items():
        dense, probe = 1000 * seconds["dense"], 1000 * seconds["probe"]
        lines.append(f"{tokens:6} tokens: dense {dense:8.1f} ms, with a probe {probe:8.1f} ms ({probe / dense:.2f})")
    pays = "no prompt that was tried" if found.tokens is None else f"prompts of {found.tokens} tokens or more"
    lines.append(f"a probe pays for {pays}; written to {file}: --model.prefill auto reads it beside the statistics")
    return "\n".join(lines)


def measure_break_even(settings: BenchmarkSettings, tell: Tell = print) -> BreakEven:
    """Time prompts, dense and pruned by a probe, of as many rows as the largest case has, up to its tokens."""
    settings.check()
    case = max(settings.cases, key=lambda case: case.rows * case.tokens)
    if case.rows < 2:
        raise UserError("a probe of one row never pays: give a case of several rows, such as the default of 20 x 128")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    dtype, ratio = settings.dtypes[0], settings.ratios[0]
    benchmarked = BenchmarkModel(settings, dtype, ratio)
    probing = benchmarked.variant(Variant(ProbePruning(), compiled=False, prefill="probe"))
    models = {"dense": benchmarked.variant(VARIANTS["dense"]), "probe": probing}
    found: dict[int, dict[str, float]] = {}
    for tokens in [size for size in _SIZES if 2 * case.rows <= size <= case.rows * case.tokens]:
        prompts = benchmarked.batches(Case(case.rows, tokens // case.rows))
        runners = {name: _prompt_runner(model, prompts) for name, model in models.items()}
        samples = measured(f"prompts of {tokens} tokens", runners, {}, settings, tell)
        found[tokens] = {name: statistics.median(samples[name].seconds["prompt"]) for name in models}
    return BreakEven(
        tokens=first_that_pays(found),
        seconds=found,
        pruning_ratio=ratio,
        dtype=dtype,
        environment=environment(benchmarked.device, 1),
    )


def first_that_pays(seconds: Mapping[int, Mapping[str, float]]) -> int | None:
    """The fewest tokens from which on no measured prompt was slower with a probe; None where the longest was."""
    found = None
    for tokens in sorted(seconds, reverse=True):
        if seconds[tokens]["probe"] > seconds[tokens]["dense"]:
            break
        found = tokens
    return found


def _prompt_runner(model: PreTrainedModel, prompts: Sequence[Tensor]) -> Runner:
    """Runs a prompt. A token behind it, which is not timed, has the next prompt leave slices as when generating."""
    clock = stopwatch_for(model.device)

    def run(index: int) -> Mapping[str, float]:
        cache = DynamicCache(config=model.config)
        clock.mark()
        out = model(input_ids=prompts[index], **{CACHE: cache}, use_cache=True, logits_to_keep=1)
        clock.mark()
        (seconds,) = clock.laps()
        model(input_ids=out.logits.argmax(-1), **{CACHE: cache}, use_cache=True)
        return {"prompt": seconds}

    return run
