"""Which quantisers the widths of a pruned model suit: told before the export, since a width is chosen by then."""

from collections.abc import Iterable, Mapping

from pp_lightning.export.sizes import Widths

# Rows of weights that a quantiser takes are multiples of these; others fail, or stay in wider types.
GROUPS: Mapping[str, int] = {
    "llama.cpp q8_0, q4_0": 32,
    "bitsandbytes nf4, int4 in groups of 64": 64,
    "int4 in groups of 128": 128,
    "llama.cpp Q4_K_M, Q6_K": 256,
}


def suits(layers: Iterable[Widths], head_size: int, hidden_size: int) -> dict[str, int]:
    """Matrices whose rows do not suit, by quantiser; 0 where all do."""
    rows = [width for one in layers for width in _rows(one, head_size, hidden_size)]
    return {name: sum(width % group != 0 for width in rows) for name, group in GROUPS.items()}


def shared_among(layers: Iterable[Widths]) -> list[int]:
    """Numbers of devices (of 2, 4, 8) among which tensor parallelism can share out all heads and channels."""
    numbers = [number for one in layers for number in one if number]
    return [devices for devices in (2, 4, 8) if all(number % devices == 0 for number in numbers)]


def _rows(one: Widths, head_size: int, hidden_size: int) -> list[int]:
    attention = [hidden_size] * 3 + [one.heads * head_size] if one.heads else []
    mlp = [hidden_size] * 2 + [one.channels] if one.channels else []
    return attention + mlp
