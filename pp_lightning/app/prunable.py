"""What a LightningModule needs to prune its model as the user's settings say: method, amounts, what is chosen from."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
from transformers import PreTrainedModel

from pp_lightning.allocation import settled_floors
from pp_lightning.app.forecast import Forecast, UntilTerminated
from pp_lightning.app.settings import PruningSettings
from pp_lightning.calibration import calibrate
from pp_lightning.calibration_data import CalibrationData
from pp_lightning.data.base import EvaluationData
from pp_lightning.data.datamodule import first_batch
from pp_lightning.errors import UserError
from pp_lightning.families import layers_of, shape_of
from pp_lightning.freezing import choice_for
from pp_lightning.gradients import taylor_importances
from pp_lightning.importances import Importances
from pp_lightning.methods import DynamicMethod, LLMPruner, LoRAPrune, PruningMethod, StaticMethod, Updated, name_of
from pp_lightning.methods.frozen import FrozenOnHistory
from pp_lightning.methods.gradient import GradientMethod, gradient_method
from pp_lightning.plan import Amounts, make_plan
from pp_lightning.prefill import BreakEven, Prefill, break_even_file, checked_refresh
from pp_lightning.progress import Tell, ignore_line, write_line
from pp_lightning.pruning import check_family, is_pruned, prune_, pruning_of, unprune_
from pp_lightning.recovery import Adapters, Recovered, lora_importances
from pp_lightning.statistics import Statistics
from pp_lightning.stored import is_settled
from pp_lightning.updating import LeastSquares

_RANKED = ("global", "searched")
_ROWS_AT_ONCE = 2  # published micro-batch of LoRAPrune


class PrunableModule(L.LightningModule):
    """A LightningModule that prunes its model and gives the dense one back.

    Its method and settings may be changed between two runs.

    Attributes:
        model: dense, or pruned between :meth:`prune` and :meth:`restore`.
        settings: how it is pruned and run.
        recovered: the recovered model that is evaluated, if one is.
        label: name of the row that is evaluated.
        reuse: whether further rows follow: what one pass over the calibration text gives is kept for them, and the
            dense weights too.
        update_folder: where an update, and all work on a streamed model, keeps what is finished; None keeps nothing.
    """

    def __init__(self, model: PreTrainedModel, method: PruningMethod | None, settings: PruningSettings) -> None:
        super().__init__()
        checked_refresh(settings.refresh)
        self.model = model
        self.method = method
        self.settings = settings
        self.recovered: Recovered | None = None
        self.label = "dense" if method is None else name_of(method)
        self.reuse = False
        self.update_folder: Path | None = None
        self._scratch: TemporaryDirectory[str] | None = None
        self._adapters: Adapters | None = None
        self._statistics: Statistics | None = None
        self._importances: dict[PruningMethod, Importances] = {}

    @property
    def is_streamed(self) -> bool:
        """Whether the weights of the model's layers stay on disk."""
        return is_settled(layers_of(self.model)[0])

    @property
    def place(self) -> Path | None:
        """Where unfinished work is kept: the folder that was given, or for a streamed model one that goes with it."""
        if self.update_folder is not None or not self.is_streamed:
            return self.update_folder
        if self._scratch is None:
            self._scratch = TemporaryDirectory(prefix="pp-lightning-")
        return Path(self._scratch.name)

    @property
    def tell(self) -> Tell:
        """Writes lines about long work, where progress is shown."""
        shown = self.trainer.is_global_zero and self.trainer.progress_bar_callback is not None
        return write_line if shown else ignore_line

    def use_recovered(self, recovered: Recovered) -> None:
        """Evaluate this recovered model from now on."""
        self.recovered, self.method, self.label = recovered, recovered.method, recovered.label
        self.change(pruning_ratio=recovered.amounts["pruning_ratio"])

    def change(self, **values: Any) -> None:
        """Other settings from now on."""
        self.settings = replace(self.settings, **values)

    def check_plan(self, method: PruningMethod | None, window: int, amounts: Amounts | None = None) -> None:
        """Refuse impossible ratios before any work is done."""
        if method is None:
            return
        amounts = amounts or self.amounts
        if amounts.allocation in _RANKED:
            _check_can_rank(method)
        check_family(self.model, method)
        shape = shape_of(self.model.config)
        plan = make_plan(shape, self.settled(method), amounts)
        if (amounts.allocation or method.allocation) in _RANKED:
            settled_floors(plan, shape.keys, amounts.floor, window)

    def check_importances(self, methods: Sequence[PruningMethod]) -> None:
        """Refuse, before any work is done, a file of importances that is not for all of these methods."""
        by_kind = {found.kind: found for method in methods if (found := gradient_method(method)) is not None}
        if self.settings.importances is None:
            return
        if len(by_kind) > 1:
            names = " and ".join(method.label for method in by_kind.values())
            raise UserError(f"{names} choose from importances of different kinds: leave out --model.importances")
        for method in by_kind.values():
            self._importances_in_file(method)

    def reads_calibration(self, method: PruningMethod) -> bool:
        """Whether pruning by this method reads the calibration text, for statistics or for gradients."""
        if gradient_method(method) is not None and not method.updates:
            return not _exists(self.settings.importances)
        return method.needs_statistics or method.updates or self._ranks_globally(method)

    def prune(self, data: EvaluationData) -> CalibrationData | None:
        """Prune, with adapters merged where there are some; returns what was chosen from, collected on ``data``."""
        assert self.method is not None
        method, amounts = self.settled(self.method), vars(self.amounts)
        calibration_data = self.calibration_data_for(method, data)
        if self.settings.frozen_on == "text" and isinstance(method, DynamicMethod):
            prune_(self.model, method, calibration_data, **amounts)
            method = choice_for(self.model, first_batch(data))
            unprune_(self.model)
        serving: dict[str, Any] = {}
        if isinstance(method, DynamicMethod) or not self.reuse:  # a table has static rows too, which have no prompts
            serving = {"prefill": self._prefill(method), "refresh": self.settings.refresh}
        serving |= {"keep_dense": self.reuse, "release_stats": not self.reuse, "update": self.update_for(method, data)}
        serving |= {"folder": self.place, "tell": self.tell} if self.is_streamed else {}
        prune_(self.model, method, calibration_data, **amounts, **serving)
        if self.recovered is not None:
            self._adapters = self.recovered.attach(self.model)
            self._adapters.merge()
        return calibration_data

    def update_for(self, method: PruningMethod, data: EvaluationData) -> LeastSquares | None:
        """How the weights that stay are updated, on the calibration text; None for methods that leave them."""
        if not method.updates:
            return None
        batches = list(UntilTerminated(data.calibration_batches(), self.trainer))
        return LeastSquares(batches, folder=self.place, tell=self.tell)

    def read_calibration_data(self) -> str | None:
        """Take the method's file as it stands, if there is one: what needs no calibration text at hand.

        Raises:
            UserError: it is of another model, or of another kind than the method chooses from.
        """
        method = self.method
        if (gradient := gradient_method(method)) is not None:
            found = self._importances_in_file(gradient)
            if found is None:
                return None
            self._importances[gradient] = found
            return self.settings.importances
        if method is None or method.calibration_data is not Statistics or not _exists(self.settings.statistics):
            return None
        assert self.settings.statistics is not None
        self._statistics = Statistics.load(self.settings.statistics)
        self._statistics.check_model(self.model)
        return self.settings.statistics

    def restore(self) -> None:
        """Leave the dense model behind where more rows follow."""
        if self.reuse and self._adapters is not None:
            self._adapters.detach()
        self._adapters = None
        if self.reuse and is_pruned(self.model):
            unprune_(self.model)

    def forget_statistics(self) -> None:
        """Calibrate anew when statistics are next needed: the data's seed has changed."""
        self._statistics = None
        self._importances.clear()

    @property
    def amounts(self) -> Amounts:
        """How much to prune: as is asked for, or as the recovered model was pruned."""
        return self.settings.amounts if self.recovered is None else Amounts(**self.recovered.amounts)

    def calibration_data_for(self, method: PruningMethod, data: EvaluationData) -> CalibrationData | None:
        """What the method chooses from: the same in every process."""
        if self.recovered is not None:
            return self.recovered.choices
        if (gradient := gradient_method(method)) is not None:
            return self._gradient_importances(gradient, data)
        return self._calibrated(data) if self.reads_calibration(method) else None

    def method_settings(self) -> dict[str, object]:
        """The method's settings, and those of its recovery, for a table."""
        if self.recovered is not None:
            about = self.recovered.choices.about
            return {**about["settings"], "recovery": about["recovery"]}
        searched = {"search": pruning_of(self.model).path} if is_pruned(self.model) else {}
        return {} if self.method is None else {**self.method.settings(), **(searched if any(searched.values()) else {})}

    def kept_counts(self) -> dict[str, tuple[int, int]]:
        """Fewest and most units that a layer keeps, by block."""
        if not is_pruned(self.model):
            return {}
        keep = pruning_of(self.model).keep
        counts = {str(block): [count for (_, b), count in keep.items() if b is block] for _, block in keep}
        return {block: (min(numbers), max(numbers)) for block, numbers in counts.items()}

    def _prefill(self, method: PruningMethod) -> Prefill | None:
        """How prompts run; ``auto`` by what was measured on this model, if its file is there."""
        own, file = self.settings.prefill, self.settings.statistics
        measured = None if file is None else break_even_file(file)
        is_auto = (getattr(method, "prefill", None) if own is None else own) == "auto"
        return BreakEven.load(measured).prefill if is_auto and measured is not None and measured.exists() else own

    def _ranks_globally(self, method: PruningMethod) -> bool:
        return (self.amounts.allocation or method.allocation) in _RANKED

    def settled(self, method: PruningMethod) -> PruningMethod:
        """The method as ``uniform``, ``update`` and ``frozen_on`` want it."""
        if self.settings.uniform:
            method = method.with_uniform_counts()
        if self.settings.update and isinstance(method, StaticMethod) and not method.updates:
            method = Updated(method)
        if self.settings.frozen_on == "history" and isinstance(method, DynamicMethod):
            method = FrozenOnHistory(method)
        return method

    def _gradient_importances(self, method: GradientMethod, data: EvaluationData) -> Importances:
        if method not in self._importances:
            found: Importances | None = None
            if self.trainer.is_global_zero:
                found = self._importances_in_file(method) or self._new_importances(method, data)
            found = self.trainer.strategy.broadcast(found)
            assert found is not None
            self._importances[method] = found
        return self._importances[method]

    def _importances_in_file(self, method: GradientMethod) -> Importances | None:
        file = self.settings.importances
        if file is None or not _exists(file):
            return None
        found = Importances.load(file)
        found.check_model(self.model)
        if found.kind != method.kind:
            raise UserError(
                f"{file} holds importances of the kind {found.kind}, but {type(method).__name__} chooses from "
                f"{method.kind}: name another file with --model.importances"
            )
        return found

    def _new_importances(self, method: GradientMethod, data: EvaluationData) -> Importances:
        """Importances from the calibration text, kept in the file if one is named: of all layers, for other ratios."""
        shape, file = shape_of(self.model.config), self.settings.importances
        shared: dict[str, Any] = {
            "layers": make_plan(shape, method, self.amounts).layers if file is None else range(shape.num_layers),
            "progress": self.trainer.progress_bar_callback is not None,
        }
        if isinstance(method, LoRAPrune):
            batches = data.calibration_batches(method.samples, method.window, batch_size=_ROWS_AT_ONCE)
            found = lora_importances(self.model, batches, rank=method.rank, seed=data.seed, **shared)
        else:
            assert isinstance(method, LLMPruner)
            batches = data.calibration_batches(method.samples, method.window, batch_size=method.samples)
            found = taylor_importances(self.model, batches, method.taylor, **shared)
        if file is not None:
            found.save(file)
        return found

    def _calibrated(self, data: EvaluationData) -> Statistics:
        """Statistics for the method: from this run, from the file, or from a new pass over the calibration text."""
        if self._statistics is not None:
            return self._statistics
        assert self.method is not None
        shared = self.reuse or self.settings.statistics is not None  # then other methods will want to use them too
        method = self.settled(self.method)
        plan = make_plan(shape_of(self.model.config), method, self.amounts)
        batches = data.calibration_batches()
        told = write_line if self.trainer.is_global_zero else ignore_line
        option = "--data.calibration_samples"
        forecast = Forecast("calibrating", option, data.calibration_samples, len(batches), told, self.model)
        statistics = calibrate(
            self.model,
            UntilTerminated(batches, self.trainer, forecast),
            means=shared or method.needs_means,
            layers=None if shared or self._ranks_globally(method) else plan.layers,
            save_to=self.settings.statistics if self.trainer.is_global_zero else None,
            progress=self.trainer.is_global_zero and self.trainer.progress_bar_callback is not None,
            folder=None if self.place is None else self.place / "calibration",
        )
        if self.reuse:
            self._statistics = statistics
        return statistics


def _check_can_rank(method: PruningMethod) -> None:
    gradient = gradient_method(method)
    name = type(gradient or method).__name__
    if gradient is not None:
        raise UserError(
            f"allocation=global ranks by calibration statistics and {name} has none: leave out --model.allocation "
            "(LLMPruner ranks by its own scores with --model.method.global_ranking true)"
        )
    if method.allocates:
        raise UserError(f"{name} spreads units over the layers itself: leave out --model.allocation")


def _exists(file: str | None) -> bool:
    return file is not None and Path(file).exists()
