"""Evaluating tasks one after the other, without a Trainer, in a way that can be interrupted."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pp_lightning.commonsense.datamodule import CommonsenseData
from pp_lightning.commonsense.metric import ACCURACIES, MultipleChoice
from pp_lightning.commonsense.prefixes import with_prompts
from pp_lightning.commonsense.scoring import check_window, score_batch
from pp_lightning.pruning import is_pruned, pruning_of
from pp_lightning.resume import ResumeFile
from pp_lightning.state import digest_of, load_pruning_state, pruning_state
from pp_lightning.statistics import fingerprint

Progress = Callable[[str, int, int], None]
FORMAT = "pp-lightning commonsense 1"


@dataclass(frozen=True)
class TaskResult:
    """What one task came to.

    Attributes:
        cut_rows: rows whose context lost tokens on the left.
        acc: accuracy by summed log-likelihood, in [0, 1]; ``acc_norm`` by that per character, ``acc_token`` by that per
            token (the published code's).
        seconds: wall time of tokenising and scoring.
    """

    questions: int
    rows: int
    cut_rows: int
    acc: float
    acc_stderr: float | None
    acc_norm: float
    acc_norm_stderr: float | None
    acc_token: float
    acc_token_stderr: float | None
    seconds: float


@dataclass(frozen=True)
class TaskResults:
    """Results of several tasks."""

    tasks: dict[str, TaskResult]
    settings: Mapping[str, Any]

    @property
    def mean(self) -> dict[str, float | None]:
        """Unweighted means of the accuracies over the tasks, and their standard errors as the harness's groups have."""
        results = list(self.tasks.values())
        mean: dict[str, float | None] = {}
        for name in ACCURACIES:
            mean[name] = sum(getattr(result, name) for result in results) / len(results)
            errors = [getattr(result, f"{name}_stderr") for result in results]
            known = [error for error in errors if error is not None]
            complete = len(known) == len(results)
            mean[f"{name}_stderr"] = math.hypot(*known) / len(results) if complete else None
        return mean

    @property
    def cut_rows(self) -> int:
        """Rows of all tasks whose context lost tokens on the left."""
        return sum(result.cut_rows for result in self.tasks.values())

    def as_dict(self) -> dict[str, Any]:
        """Everything in plain types, for ``results.json``."""
        tasks = {name: asdict(result) for name, result in self.tasks.items()}
        return {"tasks": tasks, "mean": self.mean, "cut_rows": self.cut_rows, "settings": dict(self.settings)}


def evaluate_tasks(
    model: PreTrainedModel,
    data: CommonsenseData,
    *,
    progress: Progress | None = None,
    resume_file: str | Path | None = None,
) -> TaskResults:
    """Score a model, dense or pruned, on every task of ``data``, which has been given the model's tokenizer.

    A dynamic method's state is put back to what it was at the call before each task and at the end: a task's result
    depends neither on the tasks before it nor on whether the evaluation was interrupted, and evaluating twice gives the
    same. Within a task it moves from batch to batch.

    Where ``torch.distributed`` is set up, each process scores its share of the batches and all return the same results.
    A dynamic method's histories then see only their own process's batches.

    ``progress`` is told the task's name, the batches done and the batches there are, before the first batch and after
    every one. ``resume_file`` is a JSON file that finished tasks are written to; those that it has already are taken
    from it.

    Raises:
        UserError: a row cannot be used (all rows are checked before the model is run), the window exceeds the model,
            logits are not finite, ``resume_file`` belongs to an evaluation with other settings, or the choice is to be
            made on contexts and a batch has none, or it would be made again by answers (``refresh``).
    """
    check_window(model, data.window)
    for task in data.tasks:
        data.num_batches(task)
    settings, state = data.evaluation_settings(), pruning_state(model)
    described = describe_model(model, state)
    context = pruning_of(model).context if is_pruned(model) else None
    if context is not None and data.choose_on == "context":
        data.check_refresh(context.refresh)
        for batch in (batch for task in data.tasks for batch in data.test_batches(task)):
            with_prompts(batch)
        described["dense prompts"] = context.dense_below
    finished = ResumeFile(resume_file, {"model": described, **settings}, FORMAT)
    results: dict[str, TaskResult] = {}
    was_training = model.training
    model.eval()
    try:
        for task in data.tasks:
            done = finished.result_of(task)
            if done is None:
                done = asdict(_evaluate_task(model, data, task, progress))
                load_pruning_state(model, state)
                finished.add(task, done)
            results[task] = TaskResult(**done)
    finally:
        load_pruning_state(model, state)
        model.train(was_training)
    return TaskResults(results, settings)


def describe_model(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What tells this model from another one: weights, and if it is pruned, method, kept units and state."""
    described: dict[str, Any] = {"weights": fingerprint(model)}
    if is_pruned(model):
        pruning = pruning_of(model)
        described["method"] = {"label": pruning.method.label, **pruning.method.settings()}
        described["kept"] = {f"{layer}.{block.value}": count for (layer, block), count in pruning.keep.items()}
        described["state"] = digest_of(state)
    return described


def _evaluate_task(model: PreTrainedModel, data: CommonsenseData, task: str, progress: Progress | None) -> TaskResult:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    start = time.perf_counter()
    metric, total = MultipleChoice(), data.num_batches(task, rank, world)
    for number, batch in enumerate(data.test_batches(task, rank, world)):
        if progress is not None and number == 0:
            progress(task, 0, total)
        metric.update(score_batch(model, batch, choose_on=data.choose_on), batch)
        if progress is not None:
            progress(task, number + 1, total)
    computed = {name: None if math.isnan(value) else value for name, value in metric.compute().items()}
    return TaskResult(**computed, seconds=time.perf_counter() - start)  # type: ignore[arg-type]
