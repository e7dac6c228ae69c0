"""The MLP block, pruned by channels."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from pp_lightning.pruned.block import PrunedBlock
from pp_lightning.pruned.surroundings import Surroundings

_CAN_WORK_IN_PLACE: Mapping[type[nn.Module], Callable[..., Tensor]] = {
    SiLUActivation: nn.functional.silu,
    nn.SiLU: nn.functional.silu,
    nn.ReLU: nn.functional.relu,
}


class PrunedMLP(PrunedBlock):
    """``down(act(gate(h)) * up(h))``, or ``down(act(up(h)))`` where there is no gate."""

    mixes_tokens = False

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

    @property
    def widths(self) -> Mapping[str, int]:
        """One row of gate and up, one column of down."""
        return dict.fromkeys((*self.parts.inputs, "output"), 1)
