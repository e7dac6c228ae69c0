"""Does compiling a deep model take longer than a shallow one? Prints a line for each depth; asserts nothing.

    python benchmarks/compile_time.py [--layers 4 32]

Each depth runs in a process of its own with an empty cache of compiled code: a LLaMA of hidden size 512 with random
weights, Probe Pruning at 40% in all layers, batches of 4 x 64 and then of 5 x 48 tokens, float32.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pp_lightning import calibrate, compile_, prune_
from pp_lightning.methods import ProbePruning


@torch.inference_mode()
def measure(layers: int) -> str:
    """One line: what compiling took at this depth."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=layers, num_attention_heads=8, vocab_size=1000
    )
    model = LlamaForCausalLM(config).eval()
    statistics = calibrate(model, [{"input_ids": torch.randint(0, 1000, (4, 64))}], progress=False)
    prune_(model, ProbePruning(), statistics, pruning_ratio=0.4, skip_layers=())
    compilation = compile_(model)
    firsts = []
    for shape in ((4, 64), (5, 48)):
        start = time.perf_counter()
        model(input_ids=torch.randint(0, 1000, shape), use_cache=False)
        firsts.append(f"{time.perf_counter() - start:.1f}")
    return (
        f"{layers} layers: {len(compilation.graphs)} graphs, {compilation.seconds:.1f} s of compiling; "
        f"first batch {firsts[0]} s, first of another size {firsts[1]} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(measure(options.layers[0]))
        return
    for layers in options.layers:
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, __file__, "--one", "--layers", str(layers)]
            subprocess.run(command, env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}, check=True)


if __name__ == "__main__":
    main()
