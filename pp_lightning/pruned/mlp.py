"""The MLP block, pruned by channels."""

from collections.abc import Mapping

from torch import Tensor

from pp_lightning.pruned.block import Projection, PrunedBlock, Surroundings, Weights
from pp_lightning.pruned.workspace import Memory


class PrunedMLP(PrunedBlock):
    """``down(act(gate(h)) * up(h))``, or ``down(act(up(h)))`` where there is no gate."""

    def states(self, normed: Tensor, weights: Weights, around: Surroundings) -> Tensor:
        """(B, S, D) to the input of the down projection, (B, S, K)."""
        activation = self.parts.extras["activation"]
        up = weights.apply("up", normed)
        activated: Tensor = (
            activation(weights.apply("gate", normed)) * up if "gate" in self.parts.inputs else activation(up)
        )
        return activated

    def slices(self, kept: Tensor, memory: Memory) -> Mapping[str, Projection]:
        """Rows of up and gate, columns of down."""
        whole = self.dense().projections
        rows = {role: whole[role].of_outputs(kept, 1, memory) for role in self.parts.inputs}
        return {**rows, "output": whole["output"].of_inputs(kept, 1, memory)}
