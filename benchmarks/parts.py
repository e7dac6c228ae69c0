"""What do the parts of Probe Pruning cost? Prints a table for one layer; asserts nothing.

    python benchmarks/parts.py [--rows 20] [--tokens 128] [--ratio 0.4] [--threads 2]

A LLaMA of hidden size 2048 (MLP 5632, 32 heads), float32, eager. Each part is timed alone, on what the last of four
layers meets in 8 different batches of random tokens, all parts in turn; shares are of the dense layer's time.
"""

import argparse
import statistics

import torch
from pp_lightning.pruned.layer import LayerPruner
from pp_lightning.pruned.surroundings import Surroundings
from pp_lightning.pruned.workspace import fresh_memory

from pp_lightning.benchmark.blocks import BlockFunction, Meeting, dense_pruner, meetings
from pp_lightning.benchmark.clock import stopwatch_for
from pp_lightning.benchmark.settings import BenchmarkSettings, Case
from pp_lightning.benchmark.subject import Subject
from pp_lightning.benchmark.timing import Samples, interleaved, part_runner
from pp_lightning.benchmark.variants import VARIANTS
from pp_lightning.pruned.block import PrunedBlock
from pp_lightning.pruned.choice import HowToRun
from pp_lightning.pruning import pruners_of

LAYER = 3


class Parts:
    """The parts of one block on the residuals that it meets."""

    def __init__(self, block: PrunedBlock, met: list[tuple[torch.Tensor, Surroundings]]) -> None:
        self.block = block
        self.met = [(residual, block.parts.norm(residual), around) for residual, around in met]
        self.choices = [
            block.choose_from(normed, residual, around, block.keep) for residual, normed, around in self.met
        ]
        block.prepare(HowToRun(block.keep, shares=False))
        self.slices = [block.slices.of(choice, fresh_memory) for choice in self.choices]
        self.seen = [self.states(index) for index in range(len(met))]

    def choose(self, index: int) -> object:
        """Probe, score and choice."""
        residual, normed, around = self.met[index]
        return self.block.choose_from(normed, residual, around, self.block.keep)

    def slice(self, index: int) -> object:
        """The copy of the kept weights."""
        return self.block.slices.for_batch(self.choices[index])

    def compute(self, index: int) -> object:
        """The whole batch on slices that are there already."""
        residual = self.met[index][0]
        return residual + self.slices[index].apply("output", self.states(index))

    def states(self, index: int) -> torch.Tensor:
        """What the front half gives for the whole batch."""
        _, normed, around = self.met[index]
        return self.block.states(normed, self.slices[index], around)

    def remember(self, index: int) -> object:
        """The history's update."""
        return self.block.remember(self.seen[index], self.choices[index].kept, self.met[index][2].places)


@torch.inference_mode()
def measure(rows: int, tokens: int, ratio: float, rounds: int) -> dict[str, Samples]:
    """Time all parts of both blocks in turn."""
    subject = Subject(BenchmarkSettings(cases=[Case(rows, tokens)]), "float32", ratio)
    model = subject.variant(VARIANTS["PP"])
    batches = subject.batches(subject.settings.cases[0])
    met = meetings(model, LAYER, batches)
    dense, pruned = dense_pruner(model, LAYER), pruners_of(model)[LAYER]
    clock = stopwatch_for(subject.device)
    functions: dict[str, BlockFunction] = {"dense layer": lambda index: _dense(dense, met[index])}
    for name, block, inputs in (
        ("attention", pruned.attention, [(m.hidden, m.around) for m in met]),
        ("MLP", pruned.mlp, [(m.middle, m.around.of_mlp()) for m in met]),
    ):
        parts = Parts(block, inputs)
        functions[f"{name}: probe, score, choice"] = parts.choose
        functions[f"{name}: copy of the kept weights"] = parts.slice
        functions[f"{name}: the batch"] = parts.compute
        functions[f"{name}: history"] = parts.remember
    runners = {name: part_runner("time", function, clock) for name, function in functions.items()}
    interleaved(runners, rounds=1, batches=len(batches), models={})
    return interleaved(runners, rounds=rounds, batches=len(batches), models={})


def _dense(pruner: LayerPruner, met: Meeting) -> object:
    how = HowToRun(pruner.attention.keep, shares=False)
    middle = met.hidden + pruner.attention(met.hidden, met.hidden, met.around, how)[0]
    return middle + pruner.mlp(middle, middle, met.around.of_mlp(), how)[0]


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
    whole = seconds["dense layer"]
    shares = {n: statistics.median(a / b for a, b in zip(own, whole, strict=True)) for n, own in seconds.items()}
    print("| part | ms, median | of the dense layer |\n| --- | ---: | ---: |")
    for name, own in seconds.items():
        print(f"| {name} | {1000 * statistics.median(own):.1f} | {shares[name]:.1%} |")
    extra = sum(share for name, share in shares.items() if name.endswith(("choice", "history")))
    print(f"| probe, choice and history together | | {extra:.1%} |")


if __name__ == "__main__":
    main()
