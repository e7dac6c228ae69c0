"""Peak memory of dense and probe-pruned evaluation, each in a process of its own. Prints a table; asserts nothing.

    python benchmarks/peak_memory.py [--rows 20] [--tokens 256] [--ratio 0.4]

The bound for Probe Pruning is the dense peak + the histories + one block's slice, + 5%. Calibration is included.
"""

import argparse
import json
import resource
import subprocess
import sys

import torch
from transformers import PreTrainedModel

from pp_lightning import calibrate, prune_
from pp_lightning.benchmark.shapes import random_model
from pp_lightning.families import shape_of
from pp_lightning.methods import ProbePruning
from pp_lightning.pruning import pruning_of

MEGA = 1e6


def batch(model: PreTrainedModel, rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(0, shape_of(model.config).vocabulary, (rows, tokens))


@torch.no_grad()
def run(model: PreTrainedModel, ids: torch.Tensor) -> None:
    model.model(input_ids=ids, use_cache=False)


def measure(variant: str, rows: int, tokens: int, ratio: float) -> dict[str, float]:
    torch.manual_seed(0)
    model = random_model("llama-2048", None, tokens, torch.float32, torch.device("cpu"))
    sizes = {"history": 0.0, "slice": 0.0}
    if variant == "pp":
        batches = [{"input_ids": batch(model, rows, tokens)}]
        stats = calibrate(model, batches, means=False, progress=False)
        prune_(model, ProbePruning(), stats, pruning_ratio=ratio, skip_layers=(), release_stats=True)
        blocks = pruning_of(model).pruners.values()
        sizes["history"] = sum(block.history.nbytes for block in blocks if block.history is not None) / MEGA
    for _ in range(3):
        run(model, batch(model, rows, tokens))
    if variant == "pp":
        context = pruning_of(model).context
        assert context is not None
        sizes["slice"] = context.memory.nbytes / MEGA
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEGA
    return {"peak": peak, **sizes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(measure(options.variant, options.rows, options.tokens, options.ratio)))
        return
    found = {}
    for variant in ("dense", "pp"):
        command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
        done = subprocess.run(command, capture_output=True, check=True)
        found[variant] = json.loads(done.stdout)
    dense, pruned = found["dense"]["peak"], found["pp"]["peak"]
    bound = 1.05 * (dense + found["pp"]["history"] + found["pp"]["slice"])
    print("| dense peak | PP peak | histories | one block's slice | bound |\n|---:|---:|---:|---:|---:|")
    print(f"| {dense:.0f} | {pruned:.0f} | {found['pp']['history']:.0f} | {found['pp']['slice']:.0f} | {bound:.0f} |")
    settings = f"B={options.rows}, S={options.tokens}, ratio {options.ratio}, float32, torch {torch.__version__}"
    print(f"\nMB, resident; {settings}")


if __name__ == "__main__":
    main()
