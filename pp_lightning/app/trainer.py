"""The Trainer with two more verbs: compare and export."""

from dataclasses import dataclass
from pathlib import Path

import lightning as L

from export import Layout
from pp_lightning.app.ablation.answers import Answer
from pp_lightning.app.ablation.questions import QUESTIONS
from pp_lightning.app.ablation.runner import Bench, checked_questions, measure
from pp_lightning.app.exporting import ExportSettings, Format, export_pruned
from pp_lightning.app.module import PrunedLM
from pp_lightning.app.results import Comparison, Evaluation
from pp_lightning.checkpoints import Dtype
from pp_lightning.data.base import EvaluationData
from pp_lightning.errors import UserError
from pp_lightning.methods import METHODS, PruningMethod, method_named

ALL_METHODS = list(METHODS)


@dataclass(frozen=True)
class Row:
    """One row of a comparison still to be evaluated."""

    method: PruningMethod | None
    pruning_ratio: float


class PruningTrainer(L.Trainer):
    """A Lightning Trainer that can also evaluate several methods and ratios in one run, and export a choice."""

    def compare(
        self,
        model: PrunedLM,
        datamodule: L.LightningDataModule,
        methods: list[str] = ALL_METHODS,
        ratios: list[float] = [0.2, 0.4],  # noqa: B006 (the command line's help shows it; never changed)
        variants: dict[str, PruningMethod] | None = None,
    ) -> list[Comparison]:
        """Evaluate the dense model and several methods and ratios on the same batches: one table, one plot.

        Args:
            model: the module; its own ``method`` and ``pruning_ratio`` are not used.
            datamodule: the data; calibration is run once.
            methods: any of full_batch, pp, best (ours, not the paper's), ppsp, flap, wanda_sp.
            ratios: fractions removed.
            variants: further rows by name: a method with settings of your own.

        Raises:
            UserError: an unknown method, or a ratio that leaves nothing.
        """
        named = {name: method_named(name) for name in methods} | (variants or {})
        rows = [Row(None, 0.0)] + [Row(method, ratio) for ratio in ratios for method in named.values()]
        for row in rows:
            model.check_plan(row.method, row.pruning_ratio)
        labels = ["dense"] + [name for _ in ratios for name in named]
        model.reuse = True
        done: list[Comparison] = []
        for label, row in zip(labels, rows, strict=True):
            evaluation = self._evaluate(model, datamodule, row, label)
            done.append(Comparison.of(evaluation, done[0].evaluation if done else evaluation))
        return done

    def ablate(
        self,
        model: PrunedLM,
        datamodule: L.LightningDataModule,
        questions: list[str] = ["methods"],  # noqa: B006 (the command line's help shows it; never changed)
        ratios: list[float] = [0.4],  # noqa: B006
        seeds: list[int] = [0, 1, 2],  # noqa: B006
    ) -> list[Answer]:
        """Answer questions about the method, each by variants that differ in one thing, on the same batches.

        Args:
            model: the module; its own ``method`` and ``pruning_ratio`` are not used.
            datamodule: the data; calibration windows are drawn and calibrated on anew for every seed.
            questions: any of methods, probe_size, probe_shape, fusion, history, ranking, residual, score, compensation,
                allocation, mlp_probe, weight, best_size, overlap.
            ratios: fractions removed.
            seeds: of the calibration windows and of drawn probes: perplexities are means over them.

        Raises:
            UserError: an unknown question, no seed, a ratio that leaves nothing, or data that is no text.
        """
        asked = checked_questions(questions, QUESTIONS)
        if not seeds or len(set(seeds)) < len(seeds):
            raise UserError(f"seeds must be different numbers, at least one, not {seeds}")
        for ratio in ratios:
            for question in asked.values():
                for variant in question.variants:
                    model.check_plan(variant.method(seeds[0]), ratio)
        assert isinstance(datamodule, EvaluationData)
        return measure(Bench(self, model, datamodule), asked, ratios, seeds)

    def export(
        self,
        model: PrunedLM,
        datamodule: EvaluationData,
        format: Format = "safetensors",
        layout: Layout | None = None,
        dtype: Dtype | None = None,
        kv_cache: bool = True,
        overwrite: bool = False,
        max_shard_size: str = "5GB",
    ) -> None:
        """Write the pruned model as a checkpoint or a graph that unmodified tools load, load it and compare.

        Args:
            model: the module; its method makes the choice.
            datamodule: the data to calibrate on; not read where ``--model.statistics`` names a finished file. Graphs of
                dynamic methods are for batches of its ``batch_size`` and ``window``.
            format: ``safetensors`` is a transformers folder; ``onnx`` and ``pt2`` (torch.export) are graphs;
                ``compiled`` adds kernels for this machine to ``pt2`` (AOTInductor).
            layout: of a transformers folder. ``uniform`` (the default) chooses the same counts in every layer and
                writes a stock class; ``per-layer`` keeps a count of its own in every layer and brings a modelling file;
                ``padded`` fills up to the widest layer.
            dtype: of the weights written; none takes that of ``--model.dtype``.
            kv_cache: whether the graph of a static choice takes and gives keys and values.
            overwrite: replace an earlier export.
            max_shard_size: of a weights file.

        Raises:
            UserError: whatever stands in the way; nothing is left behind.
        """
        model.trainer = self
        settings = ExportSettings(format, layout, dtype, kv_cache, overwrite, max_shard_size)
        export_pruned(model, datamodule, self.strategy.root_device, Path(self.default_root_dir), settings)

    def _evaluate(self, model: PrunedLM, datamodule: L.LightningDataModule, row: Row, label: str) -> Evaluation:
        model.method, model.pruning_ratio, model.label = row.method, row.pruning_ratio, label
        self.test(model, datamodule=datamodule, verbose=False)
        assert model.evaluation is not None
        return model.evaluation
