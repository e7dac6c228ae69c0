"""The MLP block, pruned by channels."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from pp_lightning.blocks import BlockModules
from pp_lightning.pruned.block import PrunedBlock
from pp_lightning.pruned.surroundings import Surroundings

_CAN_WORK_IN_PLACE: Mapping[type[nn.Module], Callable[..., Tensor]] = {
    SiLUActivation: nn.functional.silu,
    nn.SiLU: nn.functional.silu,
    nn.ReLU: nn.functional.relu,
}


class PrunedMLP(PrunedBlock):
    """``down(act(gate(h)) * up(h))``, or ``down(act(up(h)))`` where there is no gate.

    A channel takes one row of gate and up and one column of down with it.

    Args:
        modules: the block's modules.
        **block: see :class:`PrunedBlock`.
    """

    mixes_tokens = False

    def __init__(self, *, modules: BlockModules, **block: Any) -> None:
        super().__init__(modules=modules, widths=dict.fromkeys((*modules.inputs, "output"), 1), **block)

    def mix(self, projected: Mapping[str, Tensor], around: Surroundings, kept: Tensor | None) -> Tensor:
        """Projections (B, S, F or K) to the input of the down projection."""
        if "gate" not in projected:
            return self._activated(projected["up"])
        gate, up = self._activated(projected["gate"]), projected["up"]
        return gate * up if torch.is_grad_enabled() else gate.mul_(up)

    def _activated(self, states: Tensor) -> Tensor:
        """The activation of ``states``, in place where nothing needs them any more: these are the largest tensors."""
        activation = self.parts.extras["activation"]
        in_place = None if torch.is_grad_enabled() else _CAN_WORK_IN_PLACE.get(type(activation))
        result: Tensor = activation(states) if in_place is None else in_place(states, inplace=True)
        return result
