"""What do the parts of Probe Pruning cost? Prints a table for one layer; asserts nothing.

    python benchmarks/parts.py [--rows 20] [--tokens 128] [--ratio 0.4] [--threads 2]

A LLaMA of hidden size 2048 (MLP 5632, 32 heads), float32, eager. Each part is timed alone, on what the last of four
layers meets in 8 different batches of random tokens, all parts in turn; shares are of the time of its
dense attention and MLP blocks together.
"""

import argparse
import statistics
from typing import Any

import torch

from pp_lightning.benchmark.blocks import BlockFunction, Meeting, block_function, meetings
from pp_lightning.benchmark.clock import stopwatch_for
from pp_lightning.benchmark.settings import BenchmarkSettings, Case
from pp_lightning.benchmark.subject import Subject
from pp_lightning.benchmark.timing import Samples, interleaved, part_runner
from pp_lightning.benchmark.variants import VARIANTS
from pp_lightning.blocks import Block
from pp_lightning.functional.moments import sum_of_squares, update_history_
from pp_lightning.functional.probe import probe_arguments
from pp_lightning.functional.selection import keep_best, unit_channels
from pp_lightning.pruned.block import PrunedBlock
from pp_lightning.pruned.choice import Choice
from pp_lightning.pruning import pruning_of

LAYER = 3


class Parts:
    """The parts of one block on what it meets. What enters the block ranks the probe."""

    def __init__(self, block: PrunedBlock, met: list[Meeting]) -> None:
        self.block, self.runner, self.met = block, block.runner, met
        self.runner.slices.prepare(leaves=False)
        self.choices = [self.choose(index) for index in range(len(met))]
        # A buffer of its own for each: what is held here must not be written over.
        self.slices = [
            {name: type(one)(one.weight.clone(), one.bias) for name, one in self.slice(index).items()}
            for index in range(len(met))
        ]
        self.seen = [self.states(index) for index in range(len(met))]

    def choose(self, index: int) -> Choice:
        """Probe, score and choice."""
        block, (shape, hidden, given) = self.block, self.met[index]
        method, attention = block.method, block.block is Block.ATTENTION
        probe = method.select(hidden, hidden, None, method.probe_sizes(*shape), mixes_tokens=attention)
        part = hidden if probe is None else probe.take(hidden)
        states = self.runner.states(part, probe_arguments(given, probe))
        energy = method.observe(states, probe, None, block.history, block.mean).energy
        return Choice(keep_best(method.unit_scores(energy, block.weight_norm, block.units.channels), self.runner.keep))

    def slice(self, index: int) -> dict[str, Any]:
        """The copy of the kept weights."""
        return self.runner.slices.of(self.choices[index])

    def compute(self, index: int) -> object:
        """The whole batch on slices that are there already."""
        self.runner.narrow(self.choices[index], self.slices[index])
        return self.runner.run(self.met[index].hidden, self.met[index].given)

    def states(self, index: int) -> torch.Tensor:
        """What reaches the output projection."""
        seen: list[torch.Tensor] = []
        self.runner.narrow(self.choices[index], self.slices[index])
        self.runner.output.does = lambda states: (seen.append(states), states)[1]
        self.runner.run(self.met[index].hidden, self.met[index].given)
        return seen[0]

    def remember(self, index: int) -> object:
        """The history's update."""
        states, kept = self.seen[index], self.choices[index].kept
        assert self.block.history is not None
        moment, channels = sum_of_squares(states) / len(states), unit_channels(kept, self.block.units.channels)
        return update_history_(self.block.history, moment, channels, self.block.method.momentum, None)


@torch.inference_mode()
def measure(rows: int, tokens: int, ratio: float, rounds: int) -> dict[str, Samples]:
    """Time all parts of both blocks in turn."""
    subject = Subject(BenchmarkSettings(cases=[Case(rows, tokens)]), "float32", ratio)
    model = subject.variant(VARIANTS["PP"])
    batches = subject.batches(subject.settings.cases[0])
    clock = stopwatch_for(subject.device)
    dense: list[BlockFunction] = []
    functions: dict[str, BlockFunction] = {"dense blocks": lambda index: [run(index) for run in dense]}
    for name, block in (("attention", Block.ATTENTION), ("MLP", Block.MLP)):
        met = meetings(subject.model, (LAYER, block), batches)
        dense.append(block_function(subject.model, (LAYER, block), met, None))
        parts = Parts(pruning_of(model).pruners[LAYER, block], met)
        functions[f"{name}: probe, score, choice"] = parts.choose
        functions[f"{name}: copy of the kept weights"] = parts.slice
        functions[f"{name}: the batch"] = parts.compute
        functions[f"{name}: history"] = parts.remember
    runners = {name: part_runner("time", function, clock) for name, function in functions.items()}
    interleaved(runners, rounds=1, batches=len(batches), models={})
    return interleaved(runners, rounds=rounds, batches=len(batches), models={})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    samples = measure(options.rows, options.tokens, options.ratio, options.rounds)
    seconds = {name: one.seconds["time"] for name, one in samples.items()}
    whole = seconds["dense blocks"]
    shares = {n: statistics.median(a / b for a, b in zip(own, whole, strict=True)) for n, own in seconds.items()}
    print("| part | ms, median | of both dense blocks |\n| --- | ---: | ---: |")
    for name, own in seconds.items():
        print(f"| {name} | {1000 * statistics.median(own):.1f} | {shares[name]:.1%} |")
    extra = sum(share for name, share in shares.items() if name.endswith(("choice", "history")))
    print(f"| probe, choice and history together | | {extra:.1%} |")


if __name__ == "__main__":
    main()
