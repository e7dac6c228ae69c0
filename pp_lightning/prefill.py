"""How a prompt runs: pruned by a probe of it, or dense, where its own states choose for the tokens that follow.

A probe reads all weights of its half of a block, so that a short prompt takes longer with it than without. A dense
prompt chooses at no extra arithmetic: what it computes anyway is the probe.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from pp_lightning.errors import UserError

PrefillName = Literal["probe", "dense", "auto"]
Prefill = PrefillName | int

# Tokens (rows x length) of a prompt from which on a probe is faster than a dense run, where it was not measured on the
# model at hand. CPU: between 128, where 8 rows took 1.02 times as long, and 256, where they took 0.86 (docs/speed.md).
# CUDA: LLaMA-2-7B's shape in bfloat16 on one NVIDIA H200, eager, 20 rows: between 4100, where it took 1.34 times
# as long, and 8200, where it took 0.81 (benchmarks/results). Other accelerators: as CUDA, not measured yet.
BREAK_EVEN: Mapping[str, int] = {"cpu": 192, "cuda": 8192}
_ELSEWHERE = BREAK_EVEN["cuda"]


def dense_rows(prefill: Prefill) -> int:
    """Rows up to which a prompt runs dense, whatever its length.

    The probe of one row is half of it, half a block ahead: with the published settings 0.96 of dense arithmetic in all,
    and it never paid (1.06 times dense at 768 tokens on a CPU, 1.55 at 8192 on a GPU).
    """
    return 0 if prefill in ("probe", 0) else 1


def dense_below(prefill: Prefill, device: torch.device) -> float:
    """Tokens below which a prompt runs dense.

    Args:
        prefill: ``probe`` never, ``dense`` always, ``auto`` below a number that depends on the device, or that number.
        device: of the model.
    """
    if isinstance(prefill, int) and not isinstance(prefill, bool):
        if prefill < 0:
            raise UserError(f"prefill must not be negative: prompts of fewer tokens run dense, not {prefill}")
        return prefill
    known = {"probe": 0.0, "dense": math.inf, "auto": BREAK_EVEN.get(device.type, _ELSEWHERE)}
    if prefill not in known:
        raise UserError(f"prefill must be probe, dense, auto or a number of tokens, not {prefill!r}")
    return known[prefill]


@dataclass(frozen=True)
class BreakEven:
    """From how many tokens on a probe pays, as ``pp-lightning benchmark --calibrate-break-even`` found it.

    Attributes:
        tokens: these; None where it never did.
        seconds: of prompts, by tokens, ``dense`` and with a ``probe``.
    """

    tokens: int | None
    seconds: Mapping[int, Mapping[str, float]]
    pruning_ratio: float
    dtype: str
    environment: Mapping[str, Any]

    @property
    def prefill(self) -> Prefill:
        """What ``prune_`` is told."""
        return "dense" if self.tokens is None else self.tokens

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for the file."""
        return {"form": _FORM, **asdict(self)}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "BreakEven":
        """Read what was written."""
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            if found.pop("form") != _FORM:
                raise ValueError
            tokens = found["tokens"]
            if tokens is not None and (not isinstance(tokens, int) or tokens < 0):
                raise ValueError
            return cls(**found)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            raise UserError(
                f"{path} is not a break-even file: make it with pp-lightning benchmark --calibrate-break-even"
            ) from None


_FORM = "pp-lightning break-even 1"


def break_even_file(statistics_file: str | os.PathLike[str]) -> Path:
    """Where the break-even of a model is kept: beside its statistics."""
    return Path(statistics_file).with_suffix(".break-even.json")


def checked_refresh(refresh: int | None) -> int | None:
    """``refresh``, if it is None or a number of tokens."""
    if refresh is not None and (isinstance(refresh, bool) or not isinstance(refresh, int) or refresh < 1):
        raise UserError(f"refresh is a number of decoded tokens, at least 1, not {refresh!r}")
    return refresh
