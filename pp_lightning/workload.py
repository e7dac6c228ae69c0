"""What work on a model of some size will cost, from its config alone: weights, FLOPs, memory.

Memory is that of the process beyond what Python and torch take by themselves, in bytes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedConfig

from pp_lightning.blocks import ModelShape
from pp_lightning.families import empty_model, layers_of, shape_of_model
from pp_lightning.flops import dense_flops
from pp_lightning.updating import LeastSquares

Job = Literal["calibration", "pruning", "update", "evaluation", "export"]
JOBS: tuple[Job, ...] = ("calibration", "pruning", "update", "evaluation", "export")

_WIDE, _DOUBLE = 4, 8  # bytes of float32 and float64
_MATRICES = 4.0  # of C x C float64 at once while a block is solved: moments, the kept part, it ridged, its factor


@dataclass(frozen=True)
class Workload:
    """How much is to be done, and in what: batches of ``rows`` x ``tokens``, statistics with means or without."""

    rows: int = 20
    tokens: int = 1024
    calibration_rows: int = 2000
    test_tokens: int = 300_000
    dtype: torch.dtype = torch.bfloat16
    pruning_ratio: float = 0.4
    means: bool = True

    @property
    def calibration_batches(self) -> float:
        """How many batches are calibrated on."""
        return self.calibration_rows / self.rows

    @property
    def batches_alone(self) -> float:
        """How many batches' tokens the loss is read on with each block pruned alone."""
        tokens = min(LeastSquares.loss_tokens, self.calibration_rows * self.tokens // 10)
        return tokens / (self.rows * self.tokens)

    @property
    def test_batches(self) -> float:
        """How many batches are evaluated."""
        return self.test_tokens / (self.rows * self.tokens)


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's parts, and its numbers of weights.

    Attributes:
        parameters: weights, tied ones once.
        whole: bytes of all weights.
        outside: of those that are in no layer: embeddings, last norm, head.
        layer: of the largest layer.
        item: of one number.
    """

    shape: ModelShape
    parameters: int
    whole: int
    outside: int
    layer: int
    item: int

    @staticmethod
    def of(config: PreTrainedConfig, dtype: torch.dtype) -> "Sizes":
        """From a config; nothing is loaded."""
        model = empty_model(config)
        layers = [_number(layer.parameters()) for layer in layers_of(model)]
        total, item = _number(model.parameters()), dtype.itemsize
        outside = (total - sum(layers)) * item
        return Sizes(shape_of_model(model), total, total * item, outside, max(layers) * item, item)


def memory(sizes: Sizes, work: Workload, job: Job, *, streamed: bool) -> int:
    """Peak bytes of a job.

    ``update`` is pruning where the weights that stay take over what goes; ``export`` includes the check of the result.
    """
    shape = sizes.shape
    batch = work.rows * work.tokens * shape.hidden_size * sizes.item
    hidden = batch if streamed else int(batch * work.calibration_batches)
    held = sizes.outside + sizes.layer if streamed else sizes.whole
    layers = 1 if streamed else shape.num_layers
    running = 3 * batch + _activations(sizes, work)
    if job == "calibration":
        return held + layers * _statistics(shape, work) + running
    if job == "evaluation":
        return held + running + _logits(sizes, work)
    if job == "export":
        return held + running if streamed else int(sizes.whole * (1 - work.pruning_ratio)) + running
    scores = shape.hidden_size * _widest(shape) * (_WIDE + sizes.item)  # one output matrix, and its float32
    narrow = sizes.layer if streamed else 0
    pruning = held + narrow + (1 if streamed else shape.num_layers) * _statistics(shape, work) + scores
    if job == "pruning":
        return pruning
    solving = int((_MATRICES * _widest(shape) + 3 * shape.hidden_size) * _widest(shape) * _DOUBLE)
    copies = 1 if streamed else 2 * shape.num_layers + 1  # of few tokens, each with one block pruned alone
    alone = held + running + int(work.batches_alone * (copies * batch + _logits(sizes, work)))
    return max(pruning + solving + hidden + running, alone)


def work_flops(sizes: Sizes, work: Workload, job: Job) -> float:
    """FLOPs of a job in the model's dtype; what is solved in float64 is not among them (:func:`solving_flops`)."""
    batch = dense_flops(sizes.shape, work.rows, work.tokens)
    if job == "evaluation":
        return batch.model * work.test_batches
    if job == "calibration":
        return batch.layers * work.calibration_batches
    if job == "update":  # a quarter ranks; then each layer runs for two blocks' states, and once pruned
        layers, passes = sizes.shape.num_layers, 0.25 * 1.5 + 1.5 + 1 - work.pruning_ratio
        alone = (layers + 2) * batch.layers + (2 * layers + 1) * (batch.model - batch.layers)
        return batch.layers * work.calibration_batches * passes + alone * work.batches_alone
    return 0.0


def moments_flops(sizes: Sizes, work: Workload) -> float:
    """FLOPs of all second moments of an update, in float32."""
    tokens = 1.25 * work.calibration_rows * work.tokens
    return sum(2.0 * tokens * width**2 for width in _widths(sizes.shape)) * sizes.shape.num_layers


def solving_flops(sizes: Sizes, ratio: float, ridges: int = 4) -> float:
    """FLOPs of all systems of equations of an update, in float64."""
    hidden, total = sizes.shape.hidden_size, 0.0
    for width in _widths(sizes.shape):
        kept = width * (1 - ratio)
        total += width**3 / 3 + hidden * width**2  # the ranking
        total += ridges * (kept**3 / 3 + 2 * hidden * kept**2) + 2 * kept * (width - kept) * hidden
    return total * sizes.shape.num_layers


def _activations(sizes: Sizes, work: Workload) -> int:
    """Of one batch inside of a block."""
    shape, tokens = sizes.shape, work.rows * work.tokens
    attention = (2 * shape.num_heads + 2 * shape.num_key_value_heads) * shape.head_size
    mlp = (3 if shape.gated else 2) * shape.mlp_width
    return tokens * max(attention, mlp) * sizes.item


def _logits(sizes: Sizes, work: Workload) -> int:
    """As the head makes them, and in float32 for the loss, twice."""
    return work.rows * work.tokens * sizes.shape.vocabulary * (sizes.item + 2 * _WIDE)


def _statistics(shape: ModelShape, work: Workload) -> int:
    """Of one layer."""
    return work.tokens * sum(_widths(shape)) * _WIDE * (3 if work.means else 1)


def _widths(shape: ModelShape) -> tuple[int, int]:
    return shape.num_heads * shape.head_size, shape.mlp_width


def _widest(shape: ModelShape) -> int:
    return max(_widths(shape))


def _number(weights: Iterable[nn.Parameter]) -> int:
    return sum(weight.numel() for weight in weights)
