"""Full-Batch Probing: the whole batch is the probe. The paper's upper bound in quality; it saves no time."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from pp_lightning.functional.moments import Places, placed_second_moment, second_moment
from pp_lightning.methods.base import BOTH_BLOCKS, BlockName, UnitName
from pp_lightning.methods.dynamic import AnyProbe, DynamicMethod, Sight


class FullBatchProbing(DynamicMethod):
    """Dynamic: every block first runs densely on the whole batch, then again on the units that scored best.

    No history and no calibration.

    Args:
        blocks: which blocks are pruned, ``attention``, ``mlp`` or both.
        attention_unit: ``query_head`` or ``kv_group``; None takes groups where query heads share key/value heads.
    """

    label: ClassVar[str] = "full_batch"
    needs_statistics: ClassVar[bool] = False
    keeps_history: ClassVar[bool] = False

    def __init__(self, blocks: Sequence[BlockName] = BOTH_BLOCKS, attention_unit: UnitName | None = None) -> None:
        super().__init__("current", blocks, attention_unit)

    def probe_sizes(self, num_rows: int, num_tokens: int) -> tuple[int, int]:
        """All rows and tokens."""
        return num_rows, num_tokens

    def select(
        self,
        residual: Tensor,
        normed: Tensor,
        real: Tensor | None,
        sizes: tuple[int, int] | None = None,
        *,
        lots: Tensor | None = None,
        mixes_tokens: bool = True,
    ) -> AnyProbe | None:
        """Everything."""
        return None

    def observe(
        self,
        states: Tensor,
        probe: AnyProbe | None,
        places: Places | None,
        history: Tensor | None,
        running_mean: Tensor | None,
    ) -> Sight:
        """The batch's own second moment, summed over positions."""
        moment = second_moment(states) if places is None else placed_second_moment(states, places)[0]
        return Sight(moment.sum(0))
