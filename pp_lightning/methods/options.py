"""The choices that Probe Pruning's settings name, each dispatched once."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import Tensor

from pp_lightning.errors import UserError
from pp_lightning.functional.draws import Draw, at_random, one_a_stratum
from pp_lightning.functional.scores import energy_unit_scores, energy_weight_norm, ppsp_unit_scores, ppsp_weight_norm

RankingName = Literal["residual", "input", "random", "stratified"]
ScoreName = Literal["ppsp", "energy", "centered"]
CompensationName = Literal["probe", "history"]
Name = TypeVar("Name", bound=str)


@dataclass(frozen=True)
class Score:
    """How units are scored.

    Attributes:
        weight_norm: the constant part, (D, C) to (C,) float32.
        of_units: energy (C,), the constant part and channels per unit to scores (U,).
        centred: score the deviation from the restored mean instead of the state itself.
    """

    weight_norm: Callable[[Tensor], Tensor]
    of_units: Callable[[Tensor, Tensor, int], Tensor]
    centred: bool = False


SCORES: Mapping[str, Score] = {
    "ppsp": Score(ppsp_weight_norm, ppsp_unit_scores),
    "energy": Score(energy_weight_norm, energy_unit_scores),
    "centered": Score(energy_weight_norm, energy_unit_scores, centred=True),
}

# Which of the probe's mean and the running mean is put back.
COMPENSATIONS: Mapping[str, Callable[[Tensor, Tensor | None], Tensor | None]] = {
    "probe": lambda probe, _: probe,
    "history": lambda _, running: running,
}

# Probes that are drawn at random; the other rankings are by norm.
DRAWS: Mapping[str, Draw] = {"random": at_random, "stratified": one_a_stratum}


def checked_part(setting: str, value: float) -> float:
    """``value``, if it is a fraction that is not nothing."""
    if not 0.0 < value <= 1.0:
        raise UserError(f"{setting} must be in (0, 1], not {value}")
    return value


def checked_weight(setting: str, value: float) -> float:
    """``value``, if it can weigh one thing against another."""
    if not 0.0 <= value <= 1.0:
        raise UserError(f"{setting} must be in [0, 1], not {value}")
    return value


def checked(setting: str, name: Name, choices: Iterable[str]) -> Name:
    """``name``, if it is one of ``choices``."""
    choices = list(choices)
    if name not in choices:
        raise UserError(f"{setting} must be {', '.join(choices[:-1])} or {choices[-1]}, not {name!r}")
    return name
