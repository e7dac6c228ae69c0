"""The cubic schedule of gradual pruning (LoRAPrune, arXiv 2305.18403)."""


def cubic_ratio(step: int, total: int, final: float, warmup: float, cooldown: float) -> float:
    """Fraction removed after ``step`` of ``total`` steps: 0, then a cubic that is steep at first, then ``final``.

    Args:
        step: t, from 1.
        total: T.
        final: the ratio to reach.
        warmup: fraction of the steps at the start in which nothing is removed.
        cooldown: fraction of the steps at the end that run at ``final``.
    """
    begin, end = warmup * total, total - cooldown * total
    if step <= begin:
        return 0.0
    if step >= end:
        return final
    return final * (1.0 - (1.0 - (step - begin) / (end - begin)) ** 3)


def removed_units(units: int, keep: int, ratio: float, final: float) -> int:
    """Units that are gone at ``ratio`` on the way to ``final``, when ``keep`` stay; no more than that on the way."""
    return units - keep if ratio >= final else min(int(units * ratio), units - keep)


def last_ratio(total: int, every: int, final: float, warmup: float, cooldown: float) -> float:
    """What the schedule has reached when it last removes units, which it does after every ``every`` steps."""
    last = total // every * every
    return cubic_ratio(last, total, final, warmup, cooldown) if last else 0.0
