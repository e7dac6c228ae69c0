"""Prompts of several lengths, dense against static and probe pruning: from how many tokens on does a probe pay?

Into a cache that grows, projection of the last token included. Random weights in a known shape. Three
ways: ``eager``; ``compiled`` (``compile_``: the first length has a graph of its own, all others share the one with
dynamic sizes); ``recorded`` (``compile_(mode="reduce-overhead")``, every length compiled and recorded for itself).
Variants take turns in every round. ``kernels`` is the time that the device works in an eager pass, from torch's
profiler: what the host takes to launch is not in it.

    python benchmarks/prompt_lengths.py --shape llama-2-7b --cases 1x512 20x26 20x1024 --out prompts.json
"""

import argparse
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, PreTrainedModel

from pp_lightning import compile_, uncompile_
from pp_lightning.benchmark.clock import stopwatch_for
from pp_lightning.benchmark.model import BenchmarkModel
from pp_lightning.benchmark.rows import paired_ratio
from pp_lightning.benchmark.settings import BenchmarkSettings, Case, ModelChoice
from pp_lightning.benchmark.timing import Runner, measured
from pp_lightning.benchmark.variants import Variant
from pp_lightning.caches import CACHE
from pp_lightning.methods import ProbePruning, StaticPPsp
from pp_lightning.records import environment, write_json

VARIANTS = {
    "dense": Variant(None, compiled=False),
    "static PPsp": Variant(StaticPPsp(), compiled=False),
    "probe": Variant(ProbePruning(), compiled=False, prefill="probe"),
}

KINDS = {
    "products": ("nvjet", "gemm", "gemv", "cutlass", "splitk", "flash", "fmha", "sdpa"),
    "gathers": ("gather_kernel", "index"),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-2-7b")
    parser.add_argument("--layers", type=int, help="none takes the shape's own")
    parser.add_argument("--cases", nargs="*", default=[], help="rows x tokens: 1x512 20x1024")
    parser.add_argument("--recorded", nargs="*", default=[], help="the same, to record CUDA graphs of")
    parser.add_argument("--ways", nargs="+", default=["eager", "kernels", "compiled"])
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--out", required=True, help="JSON file")
    return parser.parse_args()


def prompt(model: PreTrainedModel, text: Tensor) -> None:
    model(input_ids=text, **{CACHE: DynamicCache(config=model.config)}, use_cache=True, logits_to_keep=1)


def prompt_runner(model: PreTrainedModel, texts: list[Tensor]) -> Runner:
    clock = stopwatch_for(model.device)

    def run(index: int) -> Mapping[str, float]:
        clock.mark()
        prompt(model, texts[index])
        clock.mark()
        return {"prompt": 1000 * clock.laps()[0]}

    return run


def milliseconds(
    models: Mapping[str, PreTrainedModel], texts: list[Tensor], settings: BenchmarkSettings
) -> dict[str, dict[str, float]]:
    """Median, fastest and slowest by variant, in turn; ratios to the dense model are medians over rounds."""
    runners = {name: prompt_runner(model, texts) for name, model in models.items()}
    samples = measured(f"prompts of {tuple(texts[0].shape)}", runners, {}, settings, lambda _: None)
    timed = {name: found.seconds["prompt"] for name, found in samples.items()}
    return {
        name: {
            "median": statistics.median(own),
            "min": min(own),
            "max": max(own),
            "ratio": paired_ratio(own, timed["dense"]),
        }
        for name, own in timed.items()
    }


def kernel_milliseconds(models: Mapping[str, PreTrainedModel], texts: list[Tensor]) -> dict[str, dict[str, float]]:
    """Time that kernels take, summed over one eager pass, of all and by kind; and how many there are."""
    found: dict[str, dict[str, float]] = {}
    for name, model in models.items():
        prompt(model, texts[0])
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            prompt(model, texts[1])
            torch.cuda.synchronize()
        kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        row = found[name] = {"median": 0.0, "kernels": len(kernels)}
        for kernel in kernels:
            for key in ("median", kind_of(kernel.name)):
                row[key] = row.get(key, 0.0) + kernel.time_range.elapsed_us() / 1000
        row["ratio"] = row["median"] / found["dense"]["median"]
    return found


def kind_of(kernel: str) -> str:
    """Products and attention, gathers of weights or tokens, or anything else."""
    return next((kind for kind, words in KINDS.items() if any(word in kernel.lower() for word in words)), "others")


def compiled(models: Mapping[str, PreTrainedModel], measure: Callable[[], dict[str, Any]], mode: Any) -> dict[str, Any]:
    """What is measured while the models are compiled."""
    for model in models.values():
        compile_(model, mode=mode)
    try:
        return measure()
    finally:
        for model in models.values():
            uncompile_(model)


@torch.inference_mode()
def main() -> None:
    options = arguments()
    cases, recorded = [{one: sizes(one) for one in given} for given in (options.cases, options.recorded)]
    settings = BenchmarkSettings(
        model=ModelChoice(options.shape, options.layers),
        cases=[*cases.values(), *recorded.values()],
        dtypes=[options.dtype],
        device=options.device,
        repeats=options.repeats,
        warmup=options.warmup,
    )
    benchmarked = BenchmarkModel(settings, options.dtype, options.ratio)
    models = {name: benchmarked.variant(variant) for name, variant in VARIANTS.items()}
    texts = {name: benchmarked.batches(case) for name, case in (cases | recorded).items()}
    found: dict[str, Any] = {"options": vars(options), "environment": environment(benchmarked.device, 1), "ways": {}}

    def note(way: str, rows_of: Mapping[str, Any]) -> None:
        found["ways"].setdefault(way, {}).update(rows_of)
        write_json(Path(options.out), found)
        for name, rows in rows_of.items():
            ratios = "  ".join(f"{one} {row['median']:.2f} ms ({row['ratio']:.2f})" for one, row in rows.items())
            print(f"{way:9} {name:>8}: {ratios}", flush=True)

    def timed(names: Iterable[str]) -> dict[str, Any]:
        return {name: milliseconds(models, texts[name], settings) for name in names}

    if "eager" in options.ways:
        note("eager", timed(cases))
    if "kernels" in options.ways:
        note("kernels", {name: kernel_milliseconds(models, texts[name]) for name in cases})
    if "compiled" in options.ways:
        note("compiled", compiled(models, lambda: timed(cases), "default"))
    for name in recorded:
        note("recorded", compiled(models, lambda name=name: timed([name]), "reduce-overhead"))  # type: ignore[misc]


def sizes(case: str) -> Case:
    """Of ``20x1024``: rows and tokens."""
    rows, tokens = case.split("x")
    return Case(int(rows), int(tokens))


if __name__ == "__main__":
    main()
