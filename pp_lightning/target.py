"""From what is to be left of a model to the ratio that leaves it."""

import re
from dataclasses import dataclass, replace
from typing import Literal, cast

from pp_lightning.allocation import unit_flops
from pp_lightning.blocks import BlockPlan, ModelShape
from pp_lightning.errors import UserError
from pp_lightning.methods.base import PruningMethod
from pp_lightning.plan import Amounts, make_plan

Measure = Literal["params", "flops", "memory"]
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_STEPS = 1000  # ratios that are tried, at most


@dataclass(frozen=True)
class Target:
    """What is to be left.

    Attributes:
        measure: ``params`` and ``flops`` are fractions of the decoder layers' heads and MLPs, ``memory`` bytes of all
            weights.
        value: how much.
    """

    measure: Measure
    value: float

    @staticmethod
    def parse(text: str) -> "Target":
        """Read ``params=0.6``, ``flops=0.6`` or ``memory=8GB``."""
        found = re.fullmatch(r"(params|flops)=([0-9.]+)|(memory)=([0-9.]+) ?([KMGT]?B)", text.strip())
        try:
            if found is not None and found[1]:
                value = float(found[2])
                if 0.0 < value <= 1.0:
                    return Target(cast(Measure, found[1]), value)
            elif found is not None:
                return Target("memory", float(found[4]) * _UNITS.get(found[5], 1))
        except ValueError:
            pass
        raise UserError(f"target must be params=0.6, flops=0.6 (what stays, above 0) or memory=8GB, not {text!r}")

    def stays(self, shape: ModelShape, method: PruningMethod, amounts: Amounts, weights: int, size: int) -> float:
        """The fraction of heads and MLPs that stays: of their FLOPs for ``flops``, else of their weights.

        ``weights`` and ``size`` as in :meth:`ratio`.
        """
        if self.measure != "memory":
            return self.value
        units = {one.block: one.units for one in make_plan(shape, method, replace(amounts, pruning_ratio=0.0)).blocks}
        whole = sum(units[block].number * units[block].cost for _, block in shape.keys)
        return min(1.0, 1 - (weights - self.value / size) / whole)

    def ratio(
        self, shape: ModelShape, method: PruningMethod, amounts: Amounts, tokens: int, weights: int, size: int
    ) -> float:
        """The smallest pruning ratio, in thousandths, that leaves no more.

        The model has ``weights`` numbers of ``size`` bytes each; FLOPs are those of texts of ``tokens`` tokens.
        """

        def cost(block: BlockPlan) -> int:
            return unit_flops(block, tokens) if self.measure == "flops" else block.units.cost

        def left(ratio: float) -> float:
            plan = make_plan(shape, method, replace(amounts, pruning_ratio=ratio))
            plans = {block.block: block for block in plan.blocks}
            blocks = [(layer, plans[name]) for layer, name in shape.keys]
            whole = sum(block.units.number * cost(block) for _, block in blocks)
            gone = sum((b.units.number - b.keep) * cost(b) for layer, b in blocks if layer in plan.layers)
            return (weights - gone) * size if self.measure == "memory" else 1 - gone / whole

        low, high = 0, _most(shape, method, amounts)
        if left(high / _STEPS) > self.value:
            least = left(high / _STEPS)
            said = f"{least / 1e9:.2f} GB" if self.measure == "memory" else f"{least:.3f}"
            raise UserError(
                f"the most that can go leaves {self.measure}={said}: raise target, or lower skip_layers or round_to"
            )
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if left(middle / _STEPS) <= self.value else (middle + 1, high)
        return low / _STEPS


def _most(shape: ModelShape, method: PruningMethod, amounts: Amounts) -> int:
    """The largest ratio, in thousandths, that leaves something in every layer."""
    for step in range(_STEPS - 1, 0, -1):
        try:
            make_plan(shape, method, replace(amounts, pruning_ratio=step / _STEPS))
        except UserError:
            continue
        return step
    return 0
