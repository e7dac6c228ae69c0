"""What is to stay, turned into a ratio: against counting."""

import pytest

from pp_lightning import calibrate, prune_
from pp_lightning.allocation import unit_flops
from pp_lightning.errors import UserError
from pp_lightning.families import shape_of
from pp_lightning.methods import WandaSP
from pp_lightning.plan import Amounts, make_plan
from pp_lightning.pruning import pruning_of
from pp_lightning.target import Target
from tests.models import calibration_batches, config, tiny

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


@pytest.mark.parametrize("measure", ["params", "flops"])
def test_one_ranking_over_all_layers_leaves_what_was_asked(measure):
    """And not as much of the other: attention's products grow with the text, its weights do not."""
    model, tokens = tiny("llama"), 64
    stats = calibrate(model, calibration_batches(tokens=tokens), progress=False)
    ratio = Target.parse(f"{measure}=0.53").ratio(SHAPE, WandaSP(), AMOUNTS, tokens, WEIGHTS, 4)
    prune_(
        model,
        WandaSP(),
        stats,
        **vars(Amounts(ratio, None, None, (), 1, allocation="global", budget=measure, stays=0.53)),
    )
    pruning = pruning_of(model)
    stays = {}
    for name, cost in (("params", lambda b: b.units.cost), ("flops", lambda b: unit_flops(b, tokens))):
        costs = {block.block: (block.units.number, cost(block)) for block in pruning.plan.blocks}
        whole = SHAPE.num_layers * sum(number * one for number, one in costs.values())
        largest = max(one for _, one in costs.values()) / whole
        gone = sum((costs[block][0] - kept) * costs[block][1] for (_, block), kept in pruning.keep.items())
        stays[name] = (1 - gone / whole, largest)
    left, largest = stays.pop(measure)
    assert abs(left - 0.53) < largest, "to one head or channel"
    other, _ = stays.popitem()[1]
    assert abs(other - left) > 1e-3
