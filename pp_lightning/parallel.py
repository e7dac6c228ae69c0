"""Weights that several processes hold parts of, as torch's distributed tensors, and how partial outputs come together.

Two engines do so. Tensor parallelism (transformers' ``tp_plan``) leaves each process some rows or columns, for good.
FSDP2 (``fully_shard``) leaves each a part of every weight, and gives a layer whole ones while it runs. Both are known
by what they offer, so that torch's distributed packages are not imported where nobody uses them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pp_lightning.errors import UserError


def is_spread(weight: Any) -> bool:
    """Whether a weight is a distributed tensor, of which this process holds a part."""
    return hasattr(weight, "full_tensor")


def own_part(weight: Any) -> Tensor:
    """What this process holds of a weight: all of it, unless it is spread."""
    part: Tensor = weight.to_local() if is_spread(weight) else weight
    return part


def is_sharded(layer: nn.Module) -> bool:
    """Whether FSDP2 gives a layer its weights while it runs."""
    return hasattr(layer, "unshard") and hasattr(layer, "reshard")


@dataclass(frozen=True)
class Reduced:
    """Stands in for the ``forward`` of an output projection that has the columns of one process's units.

    It does what transformers' rowwise layers do: every process multiplies with its columns, the products are summed
    over all processes, and the bias is added once.

    Attributes:
        module: a Linear of these columns, (D, C / n). A bias that it has is this process's alone, and is summed too.
        group: the processes.
        bias: (D,), the whole layer's; None where it has none.
    """

    module: nn.Linear
    group: Any
    bias: Tensor | None

    def __call__(self, states: Tensor) -> Tensor:
        """States (..., C / n) of this process's units to the output (..., D) of all."""
        return self.of(lambda own: F.linear(own, self.module.weight, self.module.bias), states)

    def of(self, product: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
        """The same with another product in place of the module's."""
        partial_sum = product(states)
        if torch.is_grad_enabled() and partial_sum.requires_grad:
            raise UserError("a pruned model that several processes share has no gradients: run it in torch.no_grad()")
        torch.distributed.all_reduce(partial_sum, group=self.group)
        return partial_sum if self.bias is None else partial_sum + self.bias
