"""Probe Pruning on a vision transformer, with torch, transformers and this library alone.

    python examples/vit.py [--ratio 0.4] [--rows 16] [--rounds 9] [--threads 2] [--compiled]

A ViT of the shape of google/vit-base-patch16-224 with random weights, on random images. What it prints: how far the
pruned model is from the dense one with the dropped heads and channels silenced, which part of the FLOPs is left, and
which part of the time, as the median of rounds in which dense and pruned models take turns. Random images say nothing
about how well a pruned model sees.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from pp_lightning import calibrate, compile_, frozen_history, kept_units, prune_
from pp_lightning.flops import dense_flops, pruned_flops
from pp_lightning.methods import ProbePruning
from pp_lightning.pruning import pruning_of

CALIBRATION_BATCHES = 3


def run(config: ViTConfig, *, ratio: float, rows: int, rounds: int, compiled: bool) -> dict[str, float]:
    """Prune a ViT and compare it with the dense one.

    Args:
        config: of the ViT.
        ratio: fraction of the model's heads and channels to remove.
        rows: images in a batch.
        rounds: timed batches of each model.
        compiled: time compiled models too.

    Returns:
        ``difference``, ``flops`` (of the layers), ``time`` and, if asked for, ``time_compiled``, pruned over dense.
    """
    dense = ViTModel(config, add_pooling_layer=False).eval()
    pruned = copy.deepcopy(dense)
    side = config.image_size
    images = [torch.randn(rows, config.num_channels, side, side) for _ in range(CALIBRATION_BATCHES + rounds + 1)]

    stats = calibrate(pruned, ({"pixel_values": one} for one in images[:CALIBRATION_BATCHES]), progress=False)
    prune_(pruned, ProbePruning(), stats, pruning_ratio=ratio)

    pruning, tokens = pruning_of(pruned), (side // config.patch_size) ** 2 + 1
    left = pruned_flops(pruning.shape, pruning, rows, tokens).layers
    found = {
        "difference": difference(dense, pruned, images[0]),
        "flops": left / dense_flops(pruning.shape, rows, tokens).layers,
    }
    models: dict[str, nn.Module] = {"dense": dense, "pruned": pruned}
    if compiled:
        models |= {f"{name}, compiled": copy.deepcopy(model) for name, model in models.items()}
        compile_(models["dense, compiled"])
        compile_(models["pruned, compiled"])
    seconds = interleaved(models, images[CALIBRATION_BATCHES:])
    found["time"] = seconds["pruned"] / seconds["dense"]
    if compiled:
        found["time_compiled"] = seconds["pruned, compiled"] / seconds["dense, compiled"]
    return found


@torch.inference_mode()
def difference(dense: ViTModel, pruned: ViTModel, images: Tensor) -> float:
    """Relative difference between a pruned model and the dense one whose dropped units are silenced."""
    with frozen_history(pruned):
        found = pruned(images).last_hidden_state
    masked = copy.deepcopy(dense)
    for index, kept in kept_units(pruned).items():
        layer = masked.layers[index]
        silence(layer.attention.o_proj, kept.attention, layer.attention.head_dim)
        silence(layer.mlp.fc2, kept.mlp, 1)
    expected = masked(images).last_hidden_state
    return float((found - expected).norm() / expected.norm())


def silence(output: nn.Linear, kept: Tensor, width: int) -> None:
    """Zero the columns of an output matrix that belong to dropped units of this width."""
    stays = torch.zeros(output.in_features // width, dtype=torch.bool)
    stays[kept] = True
    output.weight.data[:, ~stays.repeat_interleave(width)] = 0.0


@torch.inference_mode()
def interleaved(models: Mapping[str, nn.Module], batches: Sequence[Tensor]) -> dict[str, float]:
    """Median seconds of each model over the batches; the first batch is not timed. All models take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for batch in batches:
        for name, model in models.items():
            start = time.perf_counter()
            model(pixel_values=batch)
            seconds[name].append(time.perf_counter() - start)
    for name, own in seconds.items():
        print(f"{name:18} {1000 * statistics.median(own[1:]):8.0f} ms  ({1000 * min(own[1:]):.0f} at best)")
    return {name: statistics.median(own[1:]) for name, own in seconds.items()}


def main() -> None:
    """Run it as a script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--compiled", action="store_true")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    found = run(ViTConfig(), ratio=given.ratio, rows=given.rows, rounds=given.rounds, compiled=given.compiled)
    print(f"difference to the masked dense model  {found['difference']:.1e}")
    print(f"FLOPs of the layers, pruned/dense     {found['flops']:.3f}")
    for name, label in (("time", "time, pruned/dense"), ("time_compiled", "time, both compiled")):
        if name in found:
            print(f"{label:37} {found[name]:.3f}  (efficiency {found['flops'] / found[name]:.2f})")


if __name__ == "__main__":
    main()
