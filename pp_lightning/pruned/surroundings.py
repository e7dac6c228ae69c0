"""What a block knows of the batch around its input."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pp_lightning.functional.moments import Places
from pp_lightning.functional.probe import Probe
from pp_lightning.methods.dynamic import AnyProbe


@dataclass(frozen=True)
class Surroundings:
    """What a block needs to know of its batch beside its input. Tensors and constants only, so that it traces.

    Attributes:
        mask: the decoder's attention mask, (B or 1, 1, S, T), bool or additive; None is causal.
        rotation: cos and sin, each (B or 1, S, d); None without rotary positions.
        places: positions of the batch; None where columns are positions and nothing is padding.
        probe_sizes: rows and tokens of the probe; None leaves it to the method.
        lots: (2, M) float32, uniform numbers to draw the probes of attention and MLP with; None where none are drawn.
        remember: whether histories move.
        cache: takes the keys and values of every layer, and gives those to attend to; None without caching.
    """

    mask: Tensor | None = None
    rotation: tuple[Tensor, Tensor] | None = None
    places: Places | None = None
    probe_sizes: tuple[int, int] | None = None
    lots: Tensor | None = None
    remember: bool = True
    cache: Any = None

    def of_batch(self, num_tokens: int) -> "Surroundings":
        """The same without the places of a cache beyond the batch: a static one has more than it holds."""
        mask = None if self.mask is None else self.mask[..., :num_tokens]
        return replace(self, mask=mask)

    def of_mlp(self) -> "Surroundings":
        """What is left for a block without attention."""
        return replace(self, mask=None, rotation=None, cache=None)

    def of_probe(self, probe: AnyProbe) -> "Surroundings":
        """Mask and rotary positions of the probe's rows and tokens, at their true positions and without a cache."""
        return Surroundings(self._probe_mask(probe), self._probe_rotation(probe))

    def _probe_mask(self, probe: AnyProbe) -> Tensor | None:
        if self.mask is None:
            return None
        assert isinstance(probe, Probe)  # attention runs among rows and tokens
        rows = self.mask if self.mask.shape[0] == 1 else self.mask.index_select(0, probe.rows)
        mask = rows.index_select(2, probe.tokens).index_select(3, probe.tokens)
        if probe.real_tokens is None:
            return mask
        return (
            mask & probe.real_tokens
            if mask.dtype == torch.bool
            else mask.masked_fill(~probe.real_tokens, torch.finfo(mask.dtype).min)
        )

    def _probe_rotation(self, probe: AnyProbe) -> tuple[Tensor, Tensor] | None:
        if self.rotation is None:
            return None
        cos, sin = (t if t.shape[0] == 1 else t.index_select(0, probe.rows) for t in self.rotation)
        return cos.index_select(1, probe.tokens), sin.index_select(1, probe.tokens)
