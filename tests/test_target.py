"""What is to stay, turned into a ratio: against counting."""

import pytest

from pp_lightning.allocation import unit_flops
from pp_lightning.errors import UserError
from pp_lightning.families import shape_of
from pp_lightning.methods import WandaSP
from pp_lightning.plan import Amounts, make_plan
from pp_lightning.target import Target
from tests.models import config

AMOUNTS = Amounts(0.0, skip_layers=(), round_to=1)
SHAPE = shape_of(config("llama"))
WEIGHTS = 10**6


def left(ratio, cost):
    plan = make_plan(SHAPE, WandaSP(), Amounts(pruning_ratio=ratio, skip_layers=(), round_to=1))
    return sum(b.keep * cost(b) for b in plan.blocks) / sum(b.units.number * cost(b) for b in plan.blocks)


@pytest.mark.parametrize(
    ("text", "cost"),
    [("params=0.6", lambda b: b.units.cost), ("flops=0.6", lambda b: unit_flops(b, 64))],
)
def test_the_smallest_ratio_that_leaves_no_more(text, cost):
    ratio = Target.parse(text).ratio(SHAPE, WandaSP(), AMOUNTS, 64, WEIGHTS, 4)
    assert left(ratio, cost) <= 0.6 < left(ratio - 0.001, cost)


def test_memory_counts_all_weights():
    ratio = Target.parse("memory=3.9MB").ratio(SHAPE, WandaSP(), AMOUNTS, 64, WEIGHTS, 4)
    plan = make_plan(SHAPE, WandaSP(), Amounts(pruning_ratio=ratio, skip_layers=(), round_to=1))
    gone = SHAPE.num_layers * sum((b.units.number - b.keep) * b.units.cost for b in plan.blocks)
    assert 4 * (WEIGHTS - gone) <= 3.9e6


@pytest.mark.parametrize("text", ["0.6", "params=0", "params=1.5", "flops=1.2.3", "memory=8", "memory=GB", ""])
def test_what_is_no_target_is_refused(text):
    with pytest.raises(UserError, match=r"params=0\.6"):
        Target.parse(text)


def test_what_no_ratio_meets_is_refused():
    with pytest.raises(UserError, match="the most that can go"):
        Target.parse("params=0.001").ratio(SHAPE, WandaSP(), AMOUNTS, 64, WEIGHTS, 4)
    with pytest.raises(UserError, match="the most that can go"):
        Target.parse("memory=1KB").ratio(SHAPE, WandaSP(), AMOUNTS, 64, WEIGHTS, 4)
