"""The Trainer with two more verbs: compare and export."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L

from pp_lightning.app.comparing import (
    Row,
    changed,
    check_comparison,
    check_seeds,
    draws,
    finished_rows,
    key_of,
    side_by_side,
)
from pp_lightning.app.export_plan import ExportSettings
from pp_lightning.app.exporting import export_pruned
from pp_lightning.app.module import PrunedLM
from pp_lightning.app.overlap import Overlap
from pp_lightning.app.prune_command import prune_and_export
from pp_lightning.app.recovery import check_recovery
from pp_lightning.app.results import Comparison, Evaluation
from pp_lightning.app.spreading import check_alone
from pp_lightning.app.studies import Study, study_named
from pp_lightning.app.training import check_same, train_recovery
from pp_lightning.checkpoints import Dtype
from pp_lightning.data.base import EvaluationData
from pp_lightning.data.datamodule import LanguageModelling
from pp_lightning.data.training import Packed, TrainingRows
from pp_lightning.errors import UserError
from pp_lightning.export import Layout
from pp_lightning.families import longest_text
from pp_lightning.importances import Importances
from pp_lightning.methods import METHODS, FullBatchProbing, PruningMethod, StaticMethod, method_named
from pp_lightning.recovery import Recovered, Recovery

# By default what needs no gradients: LoRAPrune's need an extra package, and recovery needs to know its length.
ALL_METHODS = [label for label, method in METHODS.items() if method.calibration_data is not Importances]
RECOVERED = {f"{label}_lora": method for label, method in METHODS.items() if issubclass(method, StaticMethod)}


class PruningTrainer(L.Trainer):
    """A Lightning Trainer that can also evaluate several methods and ratios in one run, and export a choice."""

    def compare(
        self,
        model: PrunedLM,
        datamodule: EvaluationData,
        methods: list[str] | None = None,
        ratios: list[float] = [0.2, 0.4],  # noqa: B006 (the command line's help shows it; never changed)
        variants: dict[str, PruningMethod] | None = None,
        seeds: list[int] | None = None,
        study: str | None = None,
    ) -> list[Comparison]:
        """Evaluate the dense model and several methods and ratios on the same batches: one table, one plot.

        Args:
            model: the module; its own ``method`` and ``pruning_ratio`` are not used.
            datamodule: the data; calibration is run once.
            methods: any of full_batch, pp, best and best_generation (ours, not the paper's), after_ocp, griffin, ppsp,
                flap, wanda_sp, llm_pruner, lora_prune;
                static_best (ours); ``_updated`` behind a static one lets what stays take over what goes;
                ``_lora`` behind a static one (llm_pruner_lora, lora_prune_lora, ...) trains adapters on
                ``--data.train``, or on the calibration text, for ``--trainer.max_steps``. Models that were trained
                into the same ``--out`` before are not trained again. None takes those that need no gradients, and with
                a ``study`` none.
            ratios: fractions removed.
            variants: further rows by name: a method with settings of your own.
            seeds: of the calibration windows and of drawn probes: perplexities are then means over them, with standard
                errors, and with differences from the first pruned row, paired by seed. None takes the data's own seed.
            study: rows that answer a question about the method, and differ in one thing: methods, probe_size,
                probe_shape, fusion, history, ranking, residual, score, compensation, allocation, mlp_probe, weight,
                best_size, overlap; under ``--data.protocol continuation`` also generation, prompt, prompt_weight,
                prefix, rows, distance, refresh.

        Raises:
            UserError: an unknown method, a ratio that leaves nothing, or a text that is not there.
        """
        _refuse_recovered(model)
        asked = None if study is None else study_named(study)
        methods = methods if methods is not None else [] if asked else ALL_METHODS
        self._suit(model, datamodule)
        studied = [] if asked is None else asked.fitting(datamodule)
        check_comparison(methods, ratios, [*(variants or {}), *studied])
        rows = self._rows(methods, ratios, variants or {}, studied, model.recovery)
        for row in rows:
            model.check_plan(row.method, datamodule.window, row.settings(model).amounts)
            if row.recovery is not None:
                check_recovery(row.method, row.recovery, self.max_steps)
        model.check_importances(
            [row.method for row in rows if row.method is not None and not row.chooses_while_trained]
        )
        self._check_texts(model, datamodule, rows)
        if seeds is not None:
            check_seeds(seeds, model, rows)
        model.reuse, model.recovery = True, None
        measure = self._measurement(model, datamodule, asked)
        found: list[list[Evaluation]] = [[] for _ in rows]
        for seed in [datamodule.seed] if seeds is None else seeds:
            if seeds is not None:
                datamodule.seed = seed
                model.forget_statistics()
            for row, evaluations in zip(rows, found, strict=True):
                evaluations.append(measure(row if seeds is None else row.seeded(seed), seed))
        return side_by_side(rows, [Evaluation.mean_of(evaluations) for evaluations in found])

    def _measurement(
        self, model: PrunedLM, datamodule: EvaluationData, study: Study | None
    ) -> Callable[[Row, int], Evaluation]:
        """Evaluates a row with a seed; what is finished, now or in an interrupted run, is not evaluated again."""
        finished = finished_rows(Path(self.default_root_dir), model, datamodule)
        overlap = Overlap() if study is not None and study.overlap else None
        self.callbacks += [] if overlap is None else [overlap]  # type: ignore[attr-defined]

        def measured(row: Row, seed: int) -> Evaluation:
            drawn = seed if draws(row, model, datamodule) else None
            key = key_of(row.label, row.method, row.pruning_ratio, drawn, {**row.model, **row.data})
            known = finished.result_of(key)
            if known is not None:
                return Evaluation.from_dict(known)
            with changed(model, {"settings": row.settings(model)}), changed(datamodule, row.data):
                done = self._evaluated(model, datamodule, row)
                if overlap is not None and row.method is not None:
                    whole = replace(row, label="full_batch", method=FullBatchProbing())
                    run = partial(self._evaluated, model, datamodule, whole)
                    done = replace(done, overlap=overlap.shares((row.pruning_ratio, seed, repr(row.data)), run))
            finished.add(key, asdict(done))
            return done

        return measured

    def _evaluated(self, model: PrunedLM, datamodule: EvaluationData, row: Row) -> Evaluation:
        """One row, with the seed of the data."""
        model.recovered, model.method, model.label = None, row.method, row.label
        if row.recovery is not None:
            model.use_recovered(self._recover(model, datamodule, row.recovery, self._folder(row)))
        return self._tested(model, datamodule)

    def export(
        self,
        model: PrunedLM,
        datamodule: EvaluationData,
        **settings: Any,
    ) -> None:
        """Write the pruned model as a checkpoint or a graph that unmodified tools load, load it and compare.

        Args:
            model: the module; its method makes the choice.
            datamodule: the data to calibrate on; not read where ``--model.statistics`` names a finished file. Graphs of
                dynamic methods are for batches of its ``batch_size`` and ``window``.
            **settings: those of :class:`~pp_lightning.app.export_plan.ExportSettings`.

        Raises:
            UserError: whatever stands in the way; nothing is left behind.
        """
        asked = ExportSettings(**settings)
        self._suit(model, datamodule)
        export_pruned(model, datamodule, self.strategy.root_device, Path(self.default_root_dir), asked)

    def prune(
        self,
        model: PrunedLM,
        datamodule: EvaluationData,
        target: str | None = None,
        layout: Layout = "per-layer",
        dtype: Dtype | None = None,
        overwrite: bool = False,
        max_shard_size: str = "5GB",
    ) -> None:
        """Calibrate, choose, update what stays, evaluate before and after, write a checkpoint and check it.

        Args:
            model: the module; without a method the choice is ``StaticBest``.
            datamodule: the data to calibrate on, and to evaluate on.
            target: what is to stay: ``params=0.6`` or ``flops=0.6`` of the decoder layers, or ``memory=8GB`` of all
                weights; none takes ``--model.pruning_ratio``.
            layout: ``per-layer`` keeps the choice as it is and brings a modelling file; ``uniform`` prunes every layer
                alike and writes a stock class; ``padded`` fills up to the widest layer.
            dtype: of the weights written; none takes that of ``--model.dtype``.
            overwrite: replace an earlier export.
            max_shard_size: of a weights file.

        Raises:
            UserError: whatever stands in the way; the folder is as before, and an interrupted run goes on beside it.
        """
        _refuse_recovered(model)
        if not isinstance(datamodule, LanguageModelling):
            raise UserError("prune evaluates and calibrates on text: leave out --data commonsense")
        self._suit(model, datamodule)
        export = ExportSettings(
            "safetensors", layout=layout, dtype=dtype, overwrite=overwrite, max_shard_size=max_shard_size
        )
        out, device, evaluated = Path(self.default_root_dir), self.strategy.root_device, partial(self._tested, model)
        prune_and_export(model, datamodule, device, out, target, export, partial(evaluated, datamodule))

    def _suit(self, model: PrunedLM, datamodule: EvaluationData) -> None:
        """Settle what depends on the model and on where it runs, before anything is checked."""
        check_alone(self.strategy)
        model.trainer = self
        datamodule.suit(longest_text(model.model.config), self.strategy.root_device)

    def _tested(self, model: PrunedLM, datamodule: EvaluationData) -> Evaluation:
        self.test(model, datamodule=datamodule, verbose=False)
        assert model.evaluation is not None
        return model.evaluation

    def _rows(
        self,
        methods: list[str],
        ratios: list[float],
        variants: dict[str, PruningMethod],
        studied: Sequence[Row],
        recovery: Recovery | None,
    ) -> list[Row]:
        """The dense model on all that it is compared on, then every method at every ratio."""
        named = {n: RECOVERED[n]() if n in RECOVERED else method_named(n) for n in methods} | variants
        trained = {name: recovery or Recovery() for name in methods if name in RECOVERED}
        if trained and self.max_steps < 1:
            raise UserError("rows with recovery need to know how long to train: set --trainer.max_steps")
        if trained and self.world_size > 1:
            raise UserError("compare trains in one process: run fit in several, then test with --model.recovered")
        data: dict[str, Mapping[str, Any]] = {"dense": {}} if named else {}
        for one in studied:
            data["dense" + "".join(f", {name} {value}" for name, value in one.data.items())] = one.data
        rows = [Row(name, data=changes) for name, changes in data.items()]
        for ratio in ratios:
            rows += [Row(name, method, ratio, trained.get(name)) for name, method in named.items()]
            rows += [replace(one, pruning_ratio=ratio) for one in studied]
        return rows

    def _check_texts(self, model: PrunedLM, datamodule: EvaluationData, rows: list[Row]) -> None:
        """Find a text that is not there now, and not after all rows in front of the first one that reads it."""
        new = [row for row in rows if row.recovery is None or not Recovered.is_in(self._folder(row))]
        choosing = [row.method for row in new if row.method is not None and not row.chooses_while_trained]
        datamodule.check_text()
        ranked = any(row.model.get("allocation") is not None for row in rows)
        if ranked or any(model.reads_calibration(method) for method in choosing):
            datamodule.calibration.check()
        if any(row.recovery is not None for row in new):
            _trained_on(datamodule).check()

    def _folder(self, row: Row) -> Path:
        return Path(self.default_root_dir) / "recovered" / f"{row.label}-{row.pruning_ratio}"

    def _recover(self, model: PrunedLM, datamodule: EvaluationData, recovery: Recovery, folder: Path) -> Recovered:
        """The recovered model of a row: trained now, or before into the same folder with the same settings."""
        if not Recovered.is_in(folder):
            model.recovery = recovery
            datamodule.train = _trained_on(datamodule)
            train_recovery(self._same_in(folder), model, datamodule)
            model.recovery = None
        recovered = Recovered.load(folder)
        check_same(recovered, model, recovery, self.max_steps, folder)
        return recovered

    def _same_in(self, folder: Path) -> L.Trainer:
        """A fresh trainer with this one's settings, for one training into ``folder``."""
        device = self.strategy.root_device
        return L.Trainer(
            accelerator=device.type,
            devices=1 if device.index is None else [device.index],
            precision=self.precision,
            max_steps=self.max_steps,
            max_epochs=-1,
            accumulate_grad_batches=self.accumulate_grad_batches,
            gradient_clip_val=self.gradient_clip_val,
            gradient_clip_algorithm=self.gradient_clip_algorithm,
            limit_val_batches=0,
            logger=False,
            enable_model_summary=False,
            enable_progress_bar=self.progress_bar_callback is not None,
            use_distributed_sampler=False,
            default_root_dir=folder,
        )


def _trained_on(datamodule: EvaluationData) -> TrainingRows:
    return datamodule.train or Packed([datamodule.calibration])


def _refuse_recovered(model: PrunedLM) -> None:
    if model.recovered is not None:
        raise UserError("this command names its own rows: evaluate a recovered model with test --model.recovered")
