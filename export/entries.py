"""The tensors of an exported checkpoint, planned by name and shape and made one shard at a time."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from export.layouts import Target
from export.sizes import INPUTS, PrunedSizes, Widths, projections
from pp_lightning.architectures import architecture_of
from pp_lightning.errors import UserError


@dataclass(frozen=True)
class Entry:
    """One tensor of the checkpoint.

    Attributes:
        name: in the state dict.
        shape: as written.
        dtype: as written.
        source: the model's weight, no larger than ``shape``; None is a bias that the target class insists on.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: Tensor | None

    @property
    def placeholder(self) -> Tensor:
        """Shape and dtype without memory."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def make(self) -> Tensor:
        """The tensor, on the CPU and contiguous: the source itself where nothing has to be added to it.

        Raises:
            UserError: it is not finite.
        """
        if self.source is None:
            return torch.zeros(self.shape, dtype=self.dtype)
        source = self.source.detach()
        if not torch.isfinite(source).all():
            raise UserError(
                f"the weight {self.name} is not finite: check the checkpoint, or export bfloat16 or float32"
            )
        if tuple(source.shape) == self.shape:
            return source.cpu().contiguous()
        whole = torch.zeros(self.shape, dtype=self.dtype)
        whole[tuple(slice(size) for size in source.shape)] = source  # padding goes behind: groups stay whole
        return whole


def entries_of(model: PreTrainedModel, sizes: PrunedSizes, target: Target) -> list[Entry]:
    """Every tensor of the checkpoint in the model's order; tied weights once."""
    architecture = architecture_of(model.config)
    written: dict[str, tuple[int, ...]] = {}
    added: dict[str, tuple[int, ...]] = {}
    dtypes = {name: weight.dtype for name, weight in model.named_parameters()}
    prefix = f"{architecture.decoder}.{architecture.layers}"
    for index, (layer, widths) in enumerate(zip(architecture.layers_of(model), target.layers, strict=True)):
        for role, module in projections(layer, architecture):
            path = f"{prefix}.{index}.{getattr(architecture, role)}"
            shape, bias_shape = _shapes(role, widths, sizes.shape.head_size, sizes.shape.hidden_size)
            written[f"{path}.weight"], written[f"{path}.bias"] = shape, bias_shape
            if module.bias is None and role in target.biases:
                added[f"{path}.bias"] = bias_shape
                dtypes[f"{path}.bias"] = module.weight.dtype
    own = [Entry(n, written.get(n, tuple(w.shape)), w.dtype, w) for n, w in model.named_parameters()]
    return own + [Entry(name, shape, dtypes[name], None) for name, shape in added.items()]


def made(entries: Iterable[Entry], names: Iterable[str]) -> Mapping[str, Tensor]:
    """The tensors of one shard."""
    wanted = set(names)
    return {entry.name: entry.make() for entry in entries if entry.name in wanted}


def total_bytes(entries: Iterable[Entry]) -> int:
    """Size of all tensors on disk."""
    return sum(entry.placeholder.nbytes for entry in entries)


def total_parameters(entries: Iterable[Entry]) -> int:
    """Number of all weights."""
    return sum(entry.placeholder.numel() for entry in entries)


def _shapes(role: str, widths: Widths, head_size: int, hidden: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a projection's weight and bias."""
    width = widths.of(role, head_size)
    return ((width, hidden), (width,)) if role in INPUTS else ((hidden, width), (hidden,))
