"""Measuring the variants of a question on equal terms: same batches, same seeds, one difference at a time."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from pp_lightning.app.ablation.answers import Answer, Kept, Run
from pp_lightning.app.ablation.questions import Question, Variant
from pp_lightning.app.module import PrunedLM
from pp_lightning.blocks import Block
from pp_lightning.data.base import EvaluationData
from pp_lightning.data.datamodule import LanguageModelling
from pp_lightning.errors import UserError, unknown
from pp_lightning.methods import FullBatchProbing
from pp_lightning.pruning import is_pruned, kept_units
from pp_lightning.resume import ResumeFile

FORMAT = "pp-lightning ablation 1"
UNFINISHED = "unfinished-ablation.json"
_FULL_BATCH = Variant("Full-Batch Probing", lambda seed: FullBatchProbing())


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
        finished: measurements of an interrupted run, which are taken from it, and where new ones are noted.
    """

    def __init__(self, trainer: L.Trainer, model: PrunedLM, data: LanguageModelling, finished: ResumeFile) -> None:
        self.trainer, self.model, self.data, self.finished = trainer, model, data, finished
        self.recorder = KeptRecorder()
        trainer.callbacks.append(self.recorder)  # type: ignore[attr-defined]
        model.reuse = True
        self._done: dict[str, Run] = {}

    def set_seed(self, seed: int) -> None:
        """Calibrate on other windows from now on."""
        self.data.seed = seed
        self.model.forget_statistics()

    def run(self, variant: Variant, ratio: float, seed: int, keep_units: bool = False) -> Run:
        """Evaluate a variant, or take what is measured already."""
        key = self._key(variant, ratio, seed)
        done = self._done.get(key)
        if done is None and not keep_units and (noted := self.finished.result_of(key)) is not None:
            done = Run(seed, **noted)
        if done is None or (done.kept is None and keep_units):
            done = self._evaluate(variant, ratio, seed, keep_units)
            figures = {name: getattr(done, name) for name in ("perplexity", "dense", "tokens", "flops_ratio")}
            self.finished.add(key, figures)
        self._done[key] = done
        return replace(done, seed=seed)  # of other seeds too, where the seed has no part in it

    def overlap(self, variant: Variant, ratio: float, seed: int) -> dict[str, float]:
        """Mean Jaccard index of the units that a variant keeps with those of Full-Batch Probing, by block."""
        key = f"overlap {self._key(variant, ratio, seed)}"
        shares = self.finished.result_of(key)
        if shares is None:
            own, full = (self.run(one, ratio, seed, keep_units=True).kept for one in (variant, _FULL_BATCH))
            assert own is not None and full is not None
            shares = {name: _mean_jaccard(own[name], full[name]) for name in full if name in own}
            self.finished.add(key, shares)
        return shares

    def _key(self, variant: Variant, ratio: float, seed: int) -> str:
        method = variant.method(seed)
        of_seed = seed if method.needs_statistics or variant.allocation == "global" else None
        settings = {"label": method.label, **method.settings()}
        overruled = [variant.allocation, variant.skip_layers, variant.refresh, dict(variant.data)]
        return json.dumps([settings, *overruled, ratio, of_seed], sort_keys=True)

    def _evaluate(self, variant: Variant, ratio: float, seed: int, keep_units: bool) -> Run:
        self.recorder.wanted = keep_units
        own = {
            "method": variant.method(seed),
            "pruning_ratio": ratio,
            "label": f"{variant.label}, seed {seed},",  # the progress bar puts the ratio behind it
            "allocation": variant.allocation or self.model.allocation,
            "skip_layers": self.model.skip_layers if variant.skip_layers is None else variant.skip_layers,
            "refresh": variant.refresh,
        }
        with _changed(self.data, variant.data):
            dense = self._dense(variant.data)
            with _changed(self.model, own):
                perplexity, tokens, flops = self._test()
        return Run(seed, perplexity, dense, tokens, flops, dict(self.recorder.kept) if keep_units else None)

    def _dense(self, data: Mapping[str, Any]) -> float:
        key = "dense" if not data else f"dense {json.dumps(dict(data), sort_keys=True)}"
        noted = self.finished.result_of(key)
        if noted is None:
            with _changed(self.model, {"method": None, "label": "dense"}):
                noted = {"perplexity": self._test()[0]}
            self.finished.add(key, noted)
        return float(noted["perplexity"])

    def _test(self) -> tuple[float, int, float]:
        self.trainer.test(self.model, datamodule=self.data, verbose=False)
        evaluation = self.model.evaluation
        assert evaluation is not None and evaluation.perplexity is not None and evaluation.tokens is not None
        return evaluation.perplexity, evaluation.tokens, evaluation.flops.model


@contextmanager
def _changed(target: object, values: Mapping[str, Any]) -> Iterator[None]:
    """Other settings for a while."""
    before = {name: getattr(target, name) for name in values}
    try:
        for name, value in values.items():
            setattr(target, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)


def _mean_jaccard(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    pairs = [(set(a.tolist()), set(b.tolist())) for a, b in zip(first, second, strict=True)]
    return sum(len(a & b) / len(a | b) for a, b in pairs) / len(pairs)


def fitting(question: Question, data: LanguageModelling) -> Question:
    """The question without variants whose prompt leaves nothing of a window to score.

    Raises:
        UserError: the question is about what follows a prompt, and the protocol has none.
    """
    if question.continues and data.protocol != "continuation":
        raise UserError("questions about what follows a prompt need --data.protocol continuation")

    def fits(variant: Variant) -> bool:
        first, _ = variant.data.get("distances", (0, 0))
        return int(variant.data.get("prefix", data.prefix)) + first < data.window

    return replace(question, variants=[one for one in question.variants if fits(one)])


def checked_questions(names: Sequence[str], known: Mapping[str, Question]) -> dict[str, Question]:
    """The questions of these names.

    Raises:
        UserError: there is no such question, or none at all.
    """
    if not names:
        raise UserError(f"no questions are asked: choose from {', '.join(known)}")
    for name in names:
        if name not in known:
            raise unknown("question", name, known)
    return {name: known[name] for name in names}


def check_evenly_matched(model: PrunedLM, data: EvaluationData) -> LanguageModelling:
    """The data, where variants will differ in what their names say and in nothing else.

    Raises:
        UserError: a setting of the model would overrule what questions vary, its statistics come from a file, which
            holds those of one seed, or the data is not text in fixed windows.
    """
    if model.statistics_file is not None or model.importances_file is not None:
        raise UserError("ablate calibrates anew for every seed: leave model.statistics and model.importances out")
    overruling = {
        "allocation": model.allocation is not None,
        "uniform": model.uniform,
        "frozen_on": model.frozen_on is not None,
        "prefill": model.prefill is not None,
        "refresh": model.refresh is not None,
        "recovered": model.recovered is not None,
    }
    for name, given in overruling.items():
        if given:
            raise UserError(f"ablate varies what --model.{name} would settle for all variants: leave it out")
    if not isinstance(data, LanguageModelling) or data.protocol == "paper":
        raise UserError("ablate compares perplexities on the same batches: use --data text, protocol contiguous")
    return data


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
                    if question.overlap:
                        overlap = bench.overlap(variant, ratio, seed)
                        overlaps.setdefault((name, ratio, index), []).append(overlap)
                    runs.setdefault((name, ratio, index), []).append(bench.run(variant, ratio, seed))
    return [
        Answer.of(name, questions[name].variants[index], ratio, done, runs[name, ratio, 0], overlaps.get(key))
        for key, done in runs.items()
        for name, ratio, index in [key]
    ]
