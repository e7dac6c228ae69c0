"""Measuring the variants of a question on equal terms: same batches, same seeds, one difference at a time."""

import json
from collections.abc import Mapping, Sequence

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from pp_lightning.app.ablation.answers import Answer, Kept, Run
from pp_lightning.app.ablation.questions import Question, Variant
from pp_lightning.app.module import PrunedLM
from pp_lightning.blocks import Block
from pp_lightning.data.base import EvaluationData
from pp_lightning.data.datamodule import LanguageModelling
from pp_lightning.errors import UserError
from pp_lightning.methods import FullBatchProbing, PruningMethod
from pp_lightning.pruning import is_pruned, kept_units


class KeptRecorder(Callback):
    """Notes the kept units of every batch of a test run, where asked to."""

    def __init__(self) -> None:
        self.wanted = False
        self.kept: Kept = {}

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the last run."""
        self.kept = {}

    def on_test_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """Note what this batch ran on."""
        assert isinstance(pl_module, PrunedLM)
        if not self.wanted or not is_pruned(pl_module.model):
            return
        for layer, units in kept_units(pl_module.model).items():
            for block, numbers in ((Block.ATTENTION, units.attention), (Block.MLP, units.mlp)):
                self.kept.setdefault(f"{layer}.{block.value}", []).append(numbers.cpu())


class Bench:
    """Runs variants on a trainer, each difference once: two questions that share a variant share its measurement.

    Args:
        trainer: runs the test loop.
        model: the module; what a variant overrules is put back.
        data: the batches. Its seed is set to each run's, so calibration windows are drawn anew; the text stays.

    Raises:
        UserError: the module reads what methods choose from in a file, which is of one seed, or the data is not text in
            fixed windows.
    """

    def __init__(self, trainer: L.Trainer, model: PrunedLM, data: EvaluationData) -> None:
        if model.statistics_file is not None or model.importances_file is not None:
            raise UserError("ablate calibrates anew for every seed: leave model.statistics and model.importances out")
        if not isinstance(data, LanguageModelling) or data.protocol != "contiguous":
            raise UserError("ablate compares perplexities on the same batches: use --data text, protocol contiguous")
        self.trainer, self.model, self.data = trainer, model, data
        self.recorder = KeptRecorder()
        trainer.callbacks.append(self.recorder)  # type: ignore[attr-defined]
        model.reuse = True
        self._done: dict[str, Run] = {}

    def set_seed(self, seed: int) -> None:
        """Calibrate on other windows from now on."""
        self.data.seed = seed
        self.model.forget_statistics()

    def run(self, variant: Variant, ratio: float, seed: int, keep_units: bool) -> Run:
        """Evaluate a variant, or take what is measured already."""
        method = variant.method(seed)
        key = self._key(method, variant, ratio, seed)
        done = self._done.get(key)
        if done is not None and (done.kept is not None or not keep_units):
            return done
        self._done[key] = self._evaluate(method, variant, ratio, seed, keep_units)
        return self._done[key]

    def overlap_with_full_batch(self, run: Run, ratio: float) -> dict[str, float]:
        """Mean Jaccard index of the units kept with those that Full-Batch Probing keeps, by block."""
        full = self.run(Variant("full", lambda seed: FullBatchProbing()), ratio, run.seed, keep_units=True)
        assert run.kept is not None and full.kept is not None
        return {name: _mean_jaccard(run.kept[name], full.kept[name]) for name in full.kept if name in run.kept}

    def _key(self, method: PruningMethod, variant: Variant, ratio: float, seed: int) -> str:
        of_seed = seed if method.needs_statistics or variant.allocation == "global" else None
        settings = {"label": method.label, **method.settings()}
        return json.dumps([settings, variant.allocation, variant.skip_layers, ratio, of_seed], sort_keys=True)

    def _evaluate(self, method: PruningMethod, variant: Variant, ratio: float, seed: int, keep_units: bool) -> Run:
        model, self.recorder.wanted = self.model, keep_units
        before = (model.method, model.pruning_ratio, model.label, model.allocation, model.skip_layers)
        dense = self._dense()
        model.method, model.pruning_ratio, model.label = method, ratio, variant.label
        model.allocation = variant.allocation or model.allocation
        model.skip_layers = model.skip_layers if variant.skip_layers is None else variant.skip_layers
        try:
            perplexity, tokens, flops = self._test()
        finally:
            model.method, model.pruning_ratio, model.label, model.allocation, model.skip_layers = before
        return Run(seed, perplexity, dense, tokens, flops, dict(self.recorder.kept) if keep_units else None)

    def _dense(self) -> float:
        done = self._done.get("dense")
        if done is None:
            before, self.model.method, self.model.label = (self.model.method, self.model.label), None, "dense"
            perplexity, tokens, flops = self._test()
            self.model.method, self.model.label = before
            done = self._done["dense"] = Run(0, perplexity, perplexity, tokens, flops)
        return done.perplexity

    def _test(self) -> tuple[float, int, float]:
        self.trainer.test(self.model, datamodule=self.data, verbose=False)
        evaluation = self.model.evaluation
        assert evaluation is not None and evaluation.perplexity is not None and evaluation.tokens is not None
        return evaluation.perplexity, evaluation.tokens, evaluation.flops.model


def _mean_jaccard(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    pairs = [(set(a.tolist()), set(b.tolist())) for a, b in zip(first, second, strict=True)]
    return sum(len(a & b) / len(a | b) for a, b in pairs) / len(pairs)


def checked_questions(names: Sequence[str], known: Mapping[str, Question]) -> dict[str, Question]:
    """The questions of these names.

    Raises:
        UserError: there is no such question, or none at all.
    """
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        asked = repr(unknown[0]) if unknown else "no question"
        raise UserError(f"unknown question {asked}: choose from {', '.join(known)}")
    return {name: known[name] for name in names}


def measure(
    bench: Bench, questions: Mapping[str, Question], ratios: Sequence[float], seeds: Sequence[int]
) -> list[Answer]:
    """Every variant of every question, at every ratio, with every seed."""
    runs: dict[tuple[str, float, int], list[Run]] = {}
    overlaps: dict[tuple[str, float, int], list[dict[str, float]]] = {}
    for seed in seeds:
        bench.set_seed(seed)
        for ratio in ratios:
            for name, question in questions.items():
                for index, variant in enumerate(question.variants):
                    run = bench.run(variant, ratio, seed, question.overlap)
                    runs.setdefault((name, ratio, index), []).append(run)
                    if question.overlap:
                        overlap = bench.overlap_with_full_batch(run, ratio)
                        overlaps.setdefault((name, ratio, index), []).append(overlap)
    return [
        Answer.of(name, questions[name].variants[index], ratio, done, runs[name, ratio, 0], overlaps.get(key))
        for key, done in runs.items()
        for name, ratio, index in [key]
    ]
