"""How a module's model is pruned and run, as the command line says it."""

from dataclasses import dataclass, fields
from typing import Literal

from pp_lightning.plan import Amounts
from pp_lightning.prefill import Prefill

FrozenOn = Literal["history", "text"]
UpdateName = Literal["least_squares"]


@dataclass(frozen=True)
class PruningSettings(Amounts):
    """All settings of how a module's model is pruned and run, beside the method.

    Attributes:
        uniform: keep the same number of units in every layer: no layer is skipped and no method ranks over layers. What
            ``export`` writes by default.
        frozen_on: make the choice of a dynamic method once and keep it: from the calibration ``history``, or for the
            first batch of ``--data.text``; none chooses per batch.
        prefill: how a dynamic method runs prompts: ``probe``, ``dense``, ``auto``, or a number of tokens below
            which they run dense, see ``prune_``; none takes the method's own.
        refresh: decoded tokens after which a dynamic method chooses MLP channels again; none holds the prompt's choice.
        update: ``least_squares``: what a static method keeps takes over what goes, block by block on the calibration
            text; none does so with methods that are made for it (StaticBest).
        statistics: a safetensors file of calibration statistics: read if it exists, else written (and resumed after an
            interruption).
        importances: the same for what LLM-Pruner and LoRAPrune choose from: a safetensors file of importances, read if
            it exists, else written. One file is for one of the two; LoRAPrune with recovery needs none.
    """

    uniform: bool = False
    frozen_on: FrozenOn | None = None
    prefill: Prefill | None = None
    refresh: int | None = None
    update: UpdateName | None = None
    statistics: str | None = None
    importances: str | None = None

    @property
    def amounts(self) -> Amounts:
        """What of it is said to ``make_plan`` and ``prune_``."""
        own = {one.name: getattr(self, one.name) for one in fields(Amounts)}
        return Amounts(**own | ({"skip_layers": (), "allocation": "uniform"} if self.uniform else {}))
