import dataclasses

import pytest

from pp_lightning import UserError
from pp_lightning.blocks import AttentionUnit, Block, ModelShape
from pp_lightning.methods import ProbePruning
from pp_lightning.plan import Amounts, make_plan

SEVEN_B = ModelShape(
    num_layers=32,
    hidden_size=4096,
    num_heads=32,
    num_key_value_heads=32,
    head_size=128,
    mlp_width=11008,
    gated=True,
    vocabulary=32000,
)
THREE_8B = dataclasses.replace(SEVEN_B, num_key_value_heads=8, mlp_width=14336)


def test_counts_of_llama_2_7b():
    plan = make_plan(SEVEN_B, ProbePruning(), Amounts(pruning_ratio=0.4))
    assert plan.layers == tuple(range(3, 32))
    attention, mlp = plan.blocks
    assert (attention.block, attention.ratio, attention.keep, attention.round_to) == (Block.ATTENTION, 0.44, 18, 1)
    assert (mlp.block, mlp.ratio, mlp.keep, mlp.round_to) == (Block.MLP, 0.44, 6208, 64)
    assert plan.unit is AttentionUnit.QUERY_HEAD


def test_units_of_grouped_queries():
    groups = make_plan(THREE_8B, ProbePruning(), Amounts(pruning_ratio=0.4))
    assert groups.unit is AttentionUnit.KV_GROUP
    assert (groups.blocks[0].units.number, groups.blocks[0].keep) == (8, 5)  # int(0.44 * 8) = 3 go
    heads = make_plan(THREE_8B, ProbePruning(attention_unit="query_head"), Amounts(pruning_ratio=0.4))
    assert (heads.blocks[0].units.number, heads.blocks[0].keep) == (32, 18)


def test_separate_ratios():
    plan = make_plan(SEVEN_B, ProbePruning(), Amounts(pruning_ratio=0.4, attention_ratio=0.0, mlp_ratio=0.6))
    assert [block.keep for block in plan.blocks] == [32, 3776]
    plan = make_plan(SEVEN_B, ProbePruning(), Amounts(pruning_ratio=0.4, attention_ratio=0.2))
    assert [block.keep for block in plan.blocks] == [25, 6208]


@pytest.mark.parametrize(("blocks", "keeps"), [(("mlp",), [32, 6208]), (("attention",), [18, 11008])])
def test_a_block_that_is_not_pruned_keeps_everything(blocks, keeps):
    plan = make_plan(SEVEN_B, ProbePruning(blocks=blocks), Amounts(pruning_ratio=0.4))
    assert [block.keep for block in plan.blocks] == keeps


def test_skipped_layers_and_rounding():
    plan = make_plan(SEVEN_B, ProbePruning(), Amounts(pruning_ratio=0.4, skip_layers=(31, 5, 5), round_to=1))
    assert plan.layers == tuple(i for i in range(32) if i not in (5, 31))
    assert plan.blocks[1].ratio == 0.43  # round(32 / 30 * 0.4, 2)
    assert plan.blocks[1].keep == 11008 - int(0.43 * 11008)
    assert make_plan(SEVEN_B, ProbePruning(), Amounts(pruning_ratio=0.4, skip_layers=())).blocks[0].ratio == 0.4


@pytest.mark.parametrize("layer", [32, -1])
def test_skipping_a_layer_that_is_not_there(layer):
    with pytest.raises(UserError, match=f"skip_layers names layer {layer}, but the model has layers 0 to 31"):
        make_plan(SEVEN_B, ProbePruning(), Amounts(pruning_ratio=0.4, skip_layers=(0, layer)))


def test_skipping_every_layer():
    with pytest.raises(UserError, match="skip_layers leaves none of the 32 layers to prune"):
        make_plan(SEVEN_B, ProbePruning(), Amounts(pruning_ratio=0.4, skip_layers=range(32)))


@pytest.mark.parametrize("name", ["pruning_ratio", "attention_ratio", "mlp_ratio"])
@pytest.mark.parametrize("value", [1.0, -0.2])
def test_ratio_out_of_range(name, value):
    with pytest.raises(UserError, match=r"must be in \[0, 1\)"):
        make_plan(SEVEN_B, ProbePruning(), Amounts(**{"pruning_ratio": 0.4, name: value}))


def test_ratio_that_leaves_nothing():
    with pytest.raises(UserError, match="leaves no head in them"):
        make_plan(SEVEN_B, ProbePruning(), Amounts(pruning_ratio=0.95))


def test_round_to():
    with pytest.raises(UserError, match="round_to must be at least 1"):
        make_plan(SEVEN_B, ProbePruning(), Amounts(pruning_ratio=0.4, round_to=0))


@pytest.mark.parametrize("round_to", [11008, 20000])
def test_a_multiple_that_no_mlp_loses_a_channel_under(round_to):
    with pytest.raises(UserError, match=f"round_to={round_to} keeps all 11008 channels.*lower round_to"):
        make_plan(SEVEN_B, ProbePruning(), Amounts(pruning_ratio=0.4, round_to=round_to))
    asked = [{"mlp_ratio": 0.0}, {"pruning_ratio": 0.0}]
    plans = [
        make_plan(SEVEN_B, ProbePruning(), Amounts(**{"pruning_ratio": 0.4, "round_to": round_to, **one}))
        for one in asked
    ]
    plans.append(make_plan(SEVEN_B, ProbePruning(blocks=("attention",)), Amounts(pruning_ratio=0.4, round_to=round_to)))
    assert [plan.blocks[1].keep for plan in plans] == [11008] * 3


@pytest.mark.parametrize(("devices", "heads", "channels"), [(2, 18, 6208), (4, 20, 6208), (8, 24, 6208)])
def test_devices_share_heads_and_channels(devices, heads, channels):
    attention, mlp = make_plan(SEVEN_B, ProbePruning(), Amounts(pruning_ratio=0.4, tensor_parallel=devices)).blocks
    assert (attention.keep, attention.round_to, mlp.keep, mlp.round_to) == (heads, devices, channels, 64)
    assert make_plan(SEVEN_B, ProbePruning(), Amounts(pruning_ratio=0.4, tensor_parallel=devices, round_to=1)).blocks[
        1
    ].keep == (-(-(11008 - int(0.44 * 11008)) // devices) * devices)


def test_devices_share_key_value_heads():
    attention, _ = make_plan(THREE_8B, ProbePruning(), Amounts(pruning_ratio=0.4, tensor_parallel=2)).blocks
    assert (attention.units.number, attention.keep) == (8, 6)
    with pytest.raises(UserError, match="tensor_parallel=8 keeps all 8 key/value heads of every layer"):
        make_plan(THREE_8B, ProbePruning(), Amounts(pruning_ratio=0.4, tensor_parallel=8))
    assert make_plan(THREE_8B, ProbePruning(), Amounts(pruning_ratio=0.4, tensor_parallel=8, attention_ratio=0.0))
    heads, _ = make_plan(
        THREE_8B, ProbePruning(attention_unit="query_head"), Amounts(pruning_ratio=0.4, tensor_parallel=8)
    ).blocks
    assert heads.keep == 24


@pytest.mark.parametrize(("devices", "message"), [(3, "does not divide the model's 32 heads"), (0, "at least 1")])
def test_devices_that_cannot_share(devices, message):
    with pytest.raises(UserError, match=message):
        make_plan(SEVEN_B, ProbePruning(), Amounts(pruning_ratio=0.4, tensor_parallel=devices))


def test_uniform_heads_skip_no_layer():
    plan = make_plan(SEVEN_B, ProbePruning(), Amounts(pruning_ratio=0.4, uniform_heads=True))
    assert plan.layers == tuple(range(32)) and [block.alike for block in plan.blocks] == [True, False]
    assert plan.blocks[0].keep == 20  # int(0.4 * 32) = 12 go
    with pytest.raises(UserError, match="skip_layers names layer 40"):
        make_plan(SEVEN_B, ProbePruning(), Amounts(pruning_ratio=0.4, uniform_heads=True, skip_layers=(40,)))
