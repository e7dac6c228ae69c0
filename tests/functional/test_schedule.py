import pytest

from pp_lightning.functional.schedule import cubic_ratio, last_ratio, removed_units


def test_cubic_by_hand():
    """LoRAPrune's schedule, with T = 100 and a tenth at both ends."""
    given = {"total": 100, "final": 0.4, "warmup": 0.1, "cooldown": 0.1}
    assert [cubic_ratio(step, **given) for step in (1, 10)] == [0.0, 0.0]
    assert cubic_ratio(50, **given) == pytest.approx(0.4 * (1 - (1 - 40 / 80) ** 3))
    assert cubic_ratio(20, **given) == pytest.approx(0.4 * (1 - (1 - 10 / 80) ** 3))
    assert [cubic_ratio(step, **given) for step in (90, 91, 100)] == [0.4, 0.4, 0.4]
    path = [cubic_ratio(step, **given) for step in range(1, 101)]
    assert path == sorted(path)


def test_without_ends_all_steps_prune():
    given = {"total": 4, "final": 1.0, "warmup": 0.0, "cooldown": 0.0}
    assert [cubic_ratio(step, **given) for step in range(1, 5)] == pytest.approx(
        [1 - (1 - s / 4) ** 3 for s in range(1, 5)]
    )
    assert cubic_ratio(4, **given) == 1.0


def test_removed_units_end_at_what_is_kept():
    assert removed_units(160, 96, 0.2, 0.44) == 32
    assert removed_units(160, 96, 0.43, 0.44) == 64  # no more than the rounded count on the way
    assert removed_units(160, 90, 0.44, 0.44) == 70
    assert removed_units(8, 5, 0.0, 0.44) == 0


def test_last_ratio_is_what_the_last_removal_sees():
    assert last_ratio(100, 10, 0.4, 0.1, 0.1) == 0.4
    assert last_ratio(95, 10, 0.4, 0.1, 0.1) == 0.4  # at step 90
    assert last_ratio(99, 30, 0.4, 0.1, 0.0) < 0.4  # at step 90, the end is at 99
    assert last_ratio(5, 10, 0.4, 0.1, 0.1) == 0.0
