"""How many units stay: the published counting rules, in Python integers so that every shape is static."""

import math

from pp_lightning.errors import UserError


def layer_ratio(pruning_ratio: float, num_layers: int, num_skipped: int) -> float:
    """Fraction to remove in each pruned layer so that the whole model loses ``pruning_ratio``.

    ``round(L / (L - skipped) * ratio, 2)``, as Probe Pruning's code has it.

    Raises:
        UserError: the ratio is outside [0, 1), no layer is left to prune, or the pruned layers would lose everything.
    """
    if not 0.0 <= pruning_ratio < 1.0:
        raise UserError(f"pruning_ratio is the fraction removed and must be in [0, 1), not {pruning_ratio}")
    pruned = num_layers - num_skipped
    if pruned <= 0:
        raise UserError(f"skip_layers leaves none of the {num_layers} layers to prune: skip fewer, [] skips none")
    ratio = round(num_layers / pruned * pruning_ratio, 2)
    if ratio >= 1.0:
        raise UserError(
            f"removing {pruning_ratio:.0%} of {num_layers} layers from the {pruned} that are not skipped leaves no "
            "head in them: lower pruning_ratio or skip fewer layers"
        )
    return ratio


def kept_heads(num_heads: int, ratio: float) -> int:
    """Heads (or key/value groups) that stay of ``num_heads``: ``int(ratio * H)`` go. At least one stays."""
    return max(1, num_heads - int(ratio * num_heads))


def kept_channels(num_channels: int, ratio: float, round_to: int) -> int:
    """MLP channels that stay of ``num_channels``: the count is rounded up to a multiple of ``round_to``.

    The result is at least ``round_to`` and at most ``num_channels``.
    """
    if ratio == 0.0:
        return num_channels
    return rounded_up(num_channels - int(ratio * num_channels), num_channels, round_to)


def rounded_up(kept: int, number: int, round_to: int) -> int:
    """``kept`` rounded up to a multiple of ``round_to``, at least ``round_to`` and at most ``number``."""
    if round_to < 1:
        raise UserError(f"round_to must be at least 1, not {round_to}")
    return min(number, max(round_to, -(-kept // round_to) * round_to))


def probe_tokens(num_tokens: int, token_ratio: float) -> int:
    """Tokens in the probe of a batch of length S: ``max(2, ceil(ratio * S))``, never more than S."""
    return min(num_tokens, max(2, _ceil(token_ratio * num_tokens)))


def probe_rows(num_rows: int, row_ratio: float) -> int:
    """Rows in the probe of a batch of B: ``ceil(ratio * B)``, at least one, never more than B."""
    return min(num_rows, max(1, _ceil(row_ratio * num_rows)))


def one_projection_is_cheaper(
    probe_places: int, batch_places: int, kept: int, number: int, *, sliced_anyway: bool = False
) -> bool:
    """Whether probe and batch should come from one projection of the batch with all weights.

    Projecting the probe with all weights and then the batch with the kept ones costs ``p + k`` times as much, where p
    is the probe's share of the batch and k the kept units'. That is 1 or more in a batch of one row, where the probe is
    half of it, and wherever the whole batch is the probe. Where the slices are needed afterwards, one projection saves
    no copy, and only a probe of the whole batch makes it worth while.

    Args:
        probe_places: rows x tokens of the probe.
        batch_places: rows x tokens of the batch.
        kept: units that stay.
        number: of all units.
        sliced_anyway: whether the slices are needed afterwards, for decoding.
    """
    if sliced_anyway:
        return probe_places >= batch_places
    return probe_places * number + batch_places * kept >= batch_places * number


def _ceil(value: float) -> int:
    """Ceiling of a product that may sit one rounding error above an integer (0.05 * 140 is 7.000000000000001)."""
    return math.ceil(value - 1e-9)
