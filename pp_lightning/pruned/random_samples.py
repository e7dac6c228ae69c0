"""The samples that probes are drawn with, new ones for every batch."""

import torch
from torch import Tensor

from pp_lightning.functional.draws import draw_samples
from pp_lightning.methods.dynamic import DynamicMethod


class RandomSamples:
    """Draws for one model under one method.

    The number of a batch must not be seen by a graph, which would hold for that batch alone: drawing stays outside.
    """

    def __init__(self, method: DynamicMethod, num_layers: int) -> None:
        self._method = method
        self._num_layers = num_layers

    def are_drawn(self, num_rows: int, num_tokens: int) -> bool:
        """Whether a (B, S) batch needs any."""
        return self._method.samples_needed(num_rows, num_tokens) > 0

    def of_batch(self, num_rows: int, num_tokens: int, batch: int, device: torch.device) -> Tensor | None:
        """Random samples for the attention and the MLP probe of every layer in the next (B, S) batch, (L, 2, M).

        They depend on the seed and the batch's number alone. None where probes are not drawn.
        """
        number = self._method.samples_needed(num_rows, num_tokens)
        if not number:
            return None
        samples = draw_samples((self._num_layers, 2, number), self._method.seed, batch)
        if device.type == "cuda":
            samples = samples.pin_memory()
        return samples.to(device, non_blocking=True)  # the host does not wait for them to arrive
