"""Does eager Probe Pruning turn saved FLOPs into saved time? Prints a Markdown table; asserts nothing.

    python benchmarks/eager_efficiency.py [--rows 20] [--tokens 128] [--dtype float32] [--ratio 0.4] [--repeats 9]

A LLaMA of random weights (4 layers, hidden 2048, MLP 5632, 32 heads). The decoder is timed, without the vocabulary
projection, so times stand against ``flops_layers``. Variants take turns within each repeat, each on the next of 8
different batches, so that a drifting machine touches them alike. Efficiency is FLOPs ratio over time ratio.
"""

import argparse
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pp_lightning import calibrate, prune_, unprune_
from pp_lightning.architectures import shape_of
from pp_lightning.flops import dense_flops, pruned_flops
from pp_lightning.methods import FullBatchProbing, ProbePruning, PruningMethod, StaticPPsp
from pp_lightning.pruning import pruning_of

VOCABULARY = 32000
VARIANTS: dict[str, PruningMethod | None] = {
    "dense": None,
    "PP": ProbePruning(),
    "PP, parallel probing": ProbePruning(probe_source="previous"),
    "static PPsp": StaticPPsp(),
    "Full-Batch Probing": FullBatchProbing(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--cpu-seconds", action="store_true", help="process time: for a machine that others use too")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_seconds else time.perf_counter
    torch.manual_seed(0)
    model = build(getattr(torch, options.dtype))
    batches = [torch.randint(0, VOCABULARY, (options.rows, options.tokens)) for _ in range(8)]
    stats = calibrate(model, [{"input_ids": torch.randint(0, VOCABULARY, (4, options.tokens))}], progress=False)
    shape = shape_of(model.config)
    dense = dense_flops(shape, options.rows, options.tokens).layers
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    ratios = {}
    for repeat in range(options.repeats):
        for name, method in VARIANTS.items():
            if method is not None:
                prune_(model, method, stats, pruning_ratio=options.ratio, skip_layers=())
                ratios[name] = pruned_flops(shape, pruning_of(model), options.rows, options.tokens).layers / dense
            run(model, batches[repeat % 8])  # warm-up
            start = clock()
            run(model, batches[(repeat + 1) % 8])
            seconds[name].append(clock() - start)
            if method is not None:
                unprune_(model)
    report(options, seconds, {"dense": 1.0, **ratios})


def build(dtype: torch.dtype) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=32,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


@torch.no_grad()
def run(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    model.model(input_ids=ids, use_cache=False)


def report(options: argparse.Namespace, seconds: dict[str, list[float]], flops: dict[str, float]) -> None:
    dense = statistics.median(seconds["dense"])
    print("| variant | ms median (min-max) | time ratio | FLOPs ratio | efficiency |")
    print("|---|---:|---:|---:|---:|")
    for name, values in seconds.items():
        middle = statistics.median(values)
        spread = f"{1000 * middle:.0f} ({1000 * min(values):.0f}-{1000 * max(values):.0f})"
        ratio = middle / dense
        print(f"| {name} | {spread} | {ratio:.3f} | {flops[name]:.3f} | {flops[name] / ratio:.2f} |")
    clock = "CPU" if options.cpu_seconds else "wall"
    print(
        f"\nB={options.rows}, S={options.tokens}, ratio {options.ratio}, {options.dtype}, {options.repeats} repeats, "
        f"{clock} time, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
