"""Full-Batch Probing: the whole batch is the probe. The paper's upper bound in quality; it saves no time."""

from typing import ClassVar

from torch import Tensor

from pp_lightning.functional.moments import TokenPositions, placed_second_moment, second_moment
from pp_lightning.methods.dynamic import AnyProbe, ProbeObservation, WholeBatchMethod


class FullBatchProbing(WholeBatchMethod):
    """Dynamic: every block first runs densely on the whole batch, then again on the units that scored best.

    No history and no calibration.

    Args:
        blocks: which blocks are pruned, ``attention``, ``mlp`` or both.
        attention_unit: ``query_head`` or ``kv_group``; None takes groups where query heads share key/value heads.
    """

    label: ClassVar[str] = "full_batch"

    def observe(
        self,
        states: Tensor,
        probe: AnyProbe | None,
        places: TokenPositions | None,
        history: Tensor | None,
        running_mean: Tensor | None,
    ) -> ProbeObservation:
        """The batch's own second moment, summed over positions."""
        moment = second_moment(states) if places is None else placed_second_moment(states, places)[0]
        return ProbeObservation(moment.sum(0))
