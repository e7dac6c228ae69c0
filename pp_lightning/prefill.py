"""How a prompt runs: pruned by a probe of it, or dense, where its own states choose for the tokens that follow.

A probe reads all weights of its half of a block, so that a short prompt takes longer with it than without. A dense
prompt chooses at no extra arithmetic: what it computes anyway is the probe.
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch

from pp_lightning.errors import UserError

PrefillName = Literal["probe", "dense", "auto"]
Prefill = PrefillName | int

# Tokens (rows x length) of a prompt from which on a probe is faster than a dense run, where it was not measured on the
# model at hand. CPU: docs/speed.md; others: arithmetic for a layer of LLaMA-2-7B, not measured yet.
BREAK_EVEN: Mapping[str, int] = {"cpu": 192}
_ELSEWHERE = 1024


def dense_below(prefill: Prefill, device: torch.device) -> float:
    """Tokens below which a prompt runs dense.

    Args:
        prefill: ``probe`` never, ``dense`` always, ``auto`` below a number that depends on the device, or that number.
        device: of the model.

    Raises:
        UserError: it is something else.
    """
    if isinstance(prefill, int) and not isinstance(prefill, bool):
        if prefill < 0:
            raise UserError(f"prefill must not be negative: prompts of fewer tokens run dense, not {prefill}")
        return prefill
    known = {"probe": 0.0, "dense": math.inf, "auto": BREAK_EVEN.get(device.type, _ELSEWHERE)}
    if prefill not in known:
        raise UserError(f"prefill must be probe, dense, auto or a number of tokens, not {prefill!r}")
    return known[prefill]


def checked_refresh(refresh: int | None) -> int | None:
    """``refresh``, if it is None or a number of tokens.

    Raises:
        UserError: it is not.
    """
    if refresh is not None and (isinstance(refresh, bool) or not isinstance(refresh, int) or refresh < 1):
        raise UserError(f"refresh is a number of decoded tokens, at least 1, not {refresh!r}")
    return refresh
