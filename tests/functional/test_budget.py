import pytest

from pp_lightning import UserError
from pp_lightning.functional.budget import (
    kept_channels,
    kept_heads,
    layer_ratio,
    one_projection_is_cheaper,
    probe_rows,
    probe_tokens,
    rounded_up,
)

LLAMA_2_7B = (32, 32, 11008)
LLAMA_2_13B = (40, 40, 13824)
LLAMA_3_8B = (32, None, 14336)  # the paper prunes only its MLP
OPT_13B = (40, 40, 20480)


@pytest.mark.parametrize(
    ("model", "ratio", "in_layer", "heads", "channels"),
    [
        (LLAMA_2_7B, 0.2, 0.22, 25, 8640),
        (LLAMA_2_7B, 0.4, 0.44, 18, 6208),
        (LLAMA_2_7B, 0.6, 0.66, 11, 3776),
        (LLAMA_2_13B, 0.2, 0.22, 32, 10816),
        (LLAMA_2_13B, 0.4, 0.43, 23, 7936),
        (LLAMA_2_13B, 0.6, 0.65, 14, 4864),
        (LLAMA_3_8B, 0.2, 0.22, None, 11200),
        (LLAMA_3_8B, 0.4, 0.44, None, 8064),
        (LLAMA_3_8B, 0.6, 0.66, None, 4928),
        (OPT_13B, 0.2, 0.22, 32, 16000),
        (OPT_13B, 0.4, 0.43, 23, 11712),
        (OPT_13B, 0.6, 0.65, 14, 7168),
    ],
)
def test_published_counts(model, ratio, in_layer, heads, channels):
    """What Probe Pruning's code keeps of the published models."""
    layers, all_heads, all_channels = model
    found = layer_ratio(ratio, layers, num_skipped=3)
    assert found == in_layer
    if heads is not None:
        assert kept_heads(all_heads, found) == heads
    assert kept_channels(all_channels, found, round_to=64) == channels


def test_counts_are_taken_in_double_precision_as_published():
    assert kept_heads(100, 0.29) == 100 - 28  # 0.29 * 100 is 28.999999999999996
    assert kept_channels(100, 0.29, round_to=1) == 100 - 28


@pytest.mark.parametrize(
    ("layers", "ratios"), [(16, (0.25, 0.49, 0.74)), (28, (0.22, 0.45, 0.67)), (80, (0.21, 0.42, 0.62))]
)
def test_layer_ratio_of_other_depths(layers, ratios):
    assert tuple(layer_ratio(r, layers, 3) for r in (0.2, 0.4, 0.6)) == ratios


def test_nothing_is_removed_at_ratio_zero():
    assert layer_ratio(0.0, 32, 3) == 0.0
    assert kept_heads(8, 0.0) == 8
    assert kept_channels(100, 0.0, round_to=64) == 100


def test_kept_channels_are_a_multiple_within_bounds():
    assert kept_channels(100, 0.5, round_to=16) == 64  # 50, rounded up
    assert kept_channels(96, 0.5, round_to=16) == 48  # exactly a multiple
    assert kept_channels(100, 0.01, round_to=64) == 100  # 128 would be more than there are
    assert kept_channels(100, 0.99, round_to=64) == 64  # at least one multiple
    assert kept_channels(20, 0.9, round_to=64) == 20  # narrower than one multiple
    assert rounded_up(0, 100, 8) == 8


def test_at_least_one_head_stays():
    assert kept_heads(8, 0.99) == 1
    assert kept_heads(1, 0.99) == 1


def test_probe_sizes():
    assert [probe_tokens(s, 0.5) for s in (1, 2, 3, 4, 5, 64, 65, 1024)] == [1, 2, 2, 2, 3, 32, 33, 512]
    assert [probe_rows(b, 0.05) for b in (1, 19, 20, 21, 40, 41)] == [1, 1, 1, 2, 2, 3]
    assert probe_tokens(7, 1.0) == 7
    assert probe_rows(7, 1.0) == 7


@pytest.mark.parametrize("number", [20, 60, 140, 280])  # products that end a rounding error above an integer
def test_probe_rows_are_not_one_too_many(number):
    assert probe_rows(number, 0.05) == number // 20


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_ratio_out_of_range(ratio):
    with pytest.raises(UserError, match=r"must be in \[0, 1\), not"):
        layer_ratio(ratio, 32, 3)


def test_no_layer_left():
    with pytest.raises(UserError, match=r"leaves none of the 3 layers.*skip fewer"):
        layer_ratio(0.4, 3, 3)


def test_everything_would_go():
    with pytest.raises(UserError, match="leaves no head in them: lower pruning_ratio or skip fewer layers"):
        layer_ratio(0.6, 4, 2)


def test_round_to_must_be_positive():
    with pytest.raises(UserError, match="round_to must be at least 1, not 0"):
        kept_channels(100, 0.5, round_to=0)


def test_one_projection_is_cheaper_where_probe_and_kept_units_make_up_the_whole():
    assert not one_projection_is_cheaper(1, 10, 8, 10)
    assert one_projection_is_cheaper(2, 10, 8, 10)
    assert one_projection_is_cheaper(10, 10, 1, 10)
    assert not one_projection_is_cheaper(9, 10, 8, 10, sliced_anyway=True)
    assert one_projection_is_cheaper(10, 10, 1, 10, sliced_anyway=True)
