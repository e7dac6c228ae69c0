"""Does parallel probing run beside the block in front of it? What it gains, and a trace of both streams.

Models with the same weights take turns: dense, probes of the current residual (``PP``), probes of the previous one in
line, and the same on the side stream. Then one pass of each of the last two is traced: how long the side stream's
kernels run, and how much of that time the main stream's kernels run too. Needs a CUDA device.

    python benchmarks/parallel_probing.py --shape llama-2-7b --cases 20x1024 1x1024 --out DIR
"""

import argparse
import gzip
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from pp_lightning.benchmark.clock import stopwatch_for
from pp_lightning.benchmark.model import BenchmarkModel
from pp_lightning.benchmark.settings import BenchmarkSettings, Case, ModelChoice
from pp_lightning.benchmark.timing import Runner, measured
from pp_lightning.benchmark.variants import Variant
from pp_lightning.methods import ProbePruning
from pp_lightning.pruning import pruning_of
from pp_lightning.records import environment, write_json

KERNELS = {"kernel", "gpu_memcpy", "gpu_memset"}
Span = tuple[float, float]  # beginning and end, microseconds


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-2-7b")
    parser.add_argument("--layers", type=int, help="none takes the shape's own")
    parser.add_argument("--cases", nargs="+", default=["20x1024", "1x1024"], help="rows x tokens")
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--out", required=True, help="folder")
    return parser.parse_args()


def run(model: PreTrainedModel, batch: Tensor) -> None:
    model(input_ids=batch, use_cache=False, logits_to_keep=1)


def runner(model: PreTrainedModel, batches: list[Tensor]) -> Runner:
    clock = stopwatch_for(model.device)

    def turn(index: int) -> Mapping[str, float]:
        clock.mark()
        run(model, batches[index])
        clock.mark()
        return {"batch": 1000 * clock.laps()[0]}

    return turn


def timed(models: dict[str, PreTrainedModel], batches: list[Tensor], settings: BenchmarkSettings) -> dict[str, Any]:
    """Milliseconds by model, in turn."""
    runners = {name: runner(model, batches) for name, model in models.items()}
    samples = measured("batches", runners, {}, settings, lambda _: None)
    kept = {name: one.seconds["batch"] for name, one in samples.items()}
    return {name: {"median": statistics.median(own), "min": min(own), "max": max(own)} for name, own in kept.items()}


def traced(model: PreTrainedModel, batch: Tensor, file: Path) -> dict[str, Any]:
    """One pass under the profiler, as a Chrome trace, and what is read from it."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run(model, batch)
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(file))
    events = json.loads(file.read_text())["traceEvents"]
    with gzip.open(file.with_suffix(".json.gz"), "wt") as packed:
        json.dump({"traceEvents": [event for event in events if event.get("cat") in KERNELS]}, packed)
    file.unlink()
    return summary(events)


def summary(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Milliseconds that each stream's kernels run, and that both run at once.

    Args:
        events: of a Chrome trace.
    """
    streams: dict[int, list[Span]] = {}
    for event in events:
        if event.get("cat") in KERNELS:
            spans = streams.setdefault(event["args"]["stream"], [])
            spans.append((event["ts"], event["ts"] + event["dur"]))
    united = {number: union(spans) for number, spans in streams.items()}
    busiest = sorted(united, key=lambda number: -length(united[number]))
    found: dict[str, Any] = {
        "streams": {str(n): {"kernels": len(streams[n]), "milliseconds": length(united[n]) / 1000} for n in busiest},
    }
    every = union([span for spans in streams.values() for span in spans])
    found["busy"] = length(every) / 1000
    found["from_first_to_last"] = (every[-1][1] - every[0][0]) / 1000 if every else 0.0
    if len(busiest) > 1:
        main, side = busiest[:2]
        found["both"] = length(common(united[main], united[side])) / 1000
    return found


def union(spans: Sequence[Span]) -> list[Span]:
    """Disjoint spans that cover the same time."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found


def common(one: Sequence[Span], other: Sequence[Span]) -> list[Span]:
    """Where two lists of disjoint spans, in order, overlap."""
    found, i, j = list[Span](), 0, 0
    while i < len(one) and j < len(other):
        start, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if start < end:
            found.append((start, end))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return found


def length(spans: Sequence[Span]) -> float:
    """Microseconds."""
    return sum(end - start for start, end in spans)


@torch.inference_mode()
def main() -> None:
    options = arguments()
    cases = [Case(*map(int, case.split("x"))) for case in options.cases]
    settings = BenchmarkSettings(
        model=ModelChoice(options.shape, options.layers),
        cases=cases,
        dtypes=[options.dtype],
        device="cuda",
        repeats=options.repeats,
        warmup=options.warmup,
    )
    benchmarked, out = BenchmarkModel(settings, options.dtype, options.ratio), Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    parallel = Variant(ProbePruning(probe_source="previous"), compiled=False)
    models = {
        "dense": benchmarked.variant(Variant(None, compiled=False)),
        "PP": benchmarked.variant(Variant(ProbePruning(), compiled=False)),
        "previous residual, in line": benchmarked.variant(parallel),
        "previous residual, side stream": benchmarked.variant(parallel),
    }
    context = pruning_of(models["previous residual, in line"]).context
    assert context is not None
    context.overlaps = False
    found: dict[str, Any] = {"options": vars(options), "environment": environment(benchmarked.device, 1), "cases": {}}
    for case in cases:
        name, batches = f"{case.rows}x{case.tokens}", benchmarked.batches(case)
        times = timed(models, batches, settings)
        traces = {
            which: traced(model, batches[0], out / f"{which.replace(', ', '_').replace(' ', '_')}_{name}.json")
            for which, model in models.items()
            if which.startswith("previous")
        }
        found["cases"][name] = {"milliseconds": times, "traces": traces}
        print(name, json.dumps(found["cases"][name], indent=1), flush=True)
        write_json(out / "parallel_probing.json", found)


if __name__ == "__main__":
    main()
