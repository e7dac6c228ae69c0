"""How a batch of each kind of data is scored, and what comes out: the seam between the module and its data."""

import time
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pp_lightning.app.metrics import BatchMeanPerplexity, Perplexity
from pp_lightning.app.results import FlopsRatios, Timing
from pp_lightning.commonsense import CommonsenseData, TaskResults, evaluate_tasks
from pp_lightning.commonsense.batching import RowBatch
from pp_lightning.commonsense.evaluate import Progress
from pp_lightning.commonsense.prefixes import beginnings, remainders, with_prompts
from pp_lightning.commonsense.scoring import chooses_per_batch
from pp_lightning.continuation import continued_logits, pieces, refresh_of
from pp_lightning.data.base import EvaluationData
from pp_lightning.data.datamodule import LanguageModelling
from pp_lightning.families import shape_of
from pp_lightning.flops import Flops, continued_flops, dense_flops, prompt_flops, pruned_flops
from pp_lightning.passes import goes_layer_by_layer, outputs_layer_by_layer
from pp_lightning.progress import Tell
from pp_lightning.pruning import is_pruned, pruning_of
from pp_lightning.shares import share_of


class Scoring(ABC):
    """Scores a model on one data module, batch by batch.

    Attributes:
        flops: dense and actual FLOPs of every batch.
        after: the same of what follows a prompt, where there is one.
    """

    def __init__(self, data: EvaluationData) -> None:
        self.data = data
        self.flops: list[tuple[Flops, Flops]] = []
        self.after: list[tuple[Flops, Flops]] = []

    @abstractmethod
    def step(self, model: PreTrainedModel, batch: Any) -> None:
        """Score one item of the data module's test dataloader."""

    def finish(self, model: PreTrainedModel) -> None:  # noqa: B027 (few have something to do)
        """Do what waits for the last item."""

    @abstractmethod
    def figures(self) -> dict[str, Any]:
        """What came out: fields of ``Evaluation``."""

    def count_flops(self, model: PreTrainedModel, rows: int, tokens: int) -> None:
        """Note the FLOPs of a (B, S) batch."""
        shape = shape_of(model.config) if share_of(model) is None else pruning_of(model).shape
        dense = dense_flops(shape, rows, tokens)
        pruned = pruned_flops(shape, pruning_of(model), rows, tokens) if is_pruned(model) else dense
        self.flops.append((dense, pruned))

    def flops_ratios(self) -> FlopsRatios:
        """Totals over all batches, relative to the dense model's."""
        after = [[flops[side].model for flops in self.after] for side in (0, 1)]
        dense, actual = ([flops[side] for flops in self.flops] for side in (0, 1))
        layers = sum(flops.layers for flops in dense)
        return FlopsRatios(
            model=sum(flops.model for flops in actual) / sum(flops.model for flops in dense),
            layers=sum(flops.layers for flops in actual) / layers,
            probe=sum(flops.probe for flops in actual) / layers,
            after_prompt=sum(after[1]) / sum(after[0]) if self.after else None,
        )


class TextScoring(Scoring):
    """Perplexity, and milliseconds a batch."""

    def __init__(self, data: LanguageModelling, device: torch.device) -> None:
        super().__init__(data)
        self.perplexity = (BatchMeanPerplexity() if data.protocol == "paper" else Perplexity()).to(device)
        self.perplexity.process_group = data.group
        self.milliseconds: list[float] = []
        self._first_shape: torch.Size | None = None

    def step(self, model: PreTrainedModel, batch: Any) -> None:
        """Run one batch, timed, and add its losses."""
        _synchronise(model.device)
        start = time.perf_counter()
        logits = self.logits(model, batch)
        _synchronise(model.device)
        elapsed = 1000 * (time.perf_counter() - start)
        self._first_shape = self._first_shape or batch["input_ids"].shape
        if batch["input_ids"].shape == self._first_shape:  # the last batch may be smaller, and compile anew
            self.milliseconds.append(elapsed)
        self.perplexity.update(logits, batch["labels"][:, -logits.shape[1] :])
        self.count_flops(model, *batch["input_ids"].shape)

    def logits(self, model: PreTrainedModel, batch: Any) -> Tensor:
        """Of the whole batch, (B, S, V), or of its last tokens."""
        logits: Tensor = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits
        return logits

    def figures(self) -> dict[str, Any]:
        """Perplexity over all processes, tokens and timing."""
        perplexity = float(self.perplexity.compute())
        with self.perplexity.sync_context():  # compute() leaves this process's own count behind
            tokens = int(self.perplexity.tokens)
        return {
            "perplexity": perplexity,
            "tokens": tokens,
            "time": Timing.of(self.milliseconds) if self.milliseconds else None,
        }


class LayerwiseTextScoring(TextScoring):
    """Perplexity of a model whose layers' weights stay on disk: all batches wait for each layer, and none is timed."""

    def __init__(self, data: LanguageModelling, device: torch.device, tell: Tell) -> None:
        super().__init__(data, device)
        self._batches: list[Any] = []
        self._tell = tell

    def step(self, model: PreTrainedModel, batch: Any) -> None:
        """Put a batch with the others."""
        self._batches.append(batch)
        self.count_flops(model, *batch["input_ids"].shape)

    def finish(self, model: PreTrainedModel) -> None:
        """Run all of them, and add their losses in their order."""
        given = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in self._batches]
        with TemporaryDirectory(prefix="pp-lightning-") as folder:
            outputs = outputs_layer_by_layer(model, given, Path(folder), self._tell)
            for batch, output in zip(self._batches, outputs, strict=True):
                self.perplexity.update(output.logits, batch["labels"])


class ContinuationScoring(TextScoring):
    """Perplexity of what follows a prompt, under the choice that the prompt made."""

    data: LanguageModelling

    def logits(self, model: PreTrainedModel, batch: Any) -> Tensor:
        """For the tokens behind the prompt, (B, S - P + 1, V)."""
        return continued_logits(model, batch["input_ids"], batch["attention_mask"], self.data.prefix)

    def count_flops(self, model: PreTrainedModel, rows: int, tokens: int) -> None:
        """Note the FLOPs of the prompt, and of what follows it."""
        shape, pruning = shape_of(model.config), pruning_of(model) if is_pruned(model) else None
        (_, prefix), *rest = pieces(tokens, self.data.prefix, refresh_of(model) or tokens)
        both: list[Flops] = []
        for one in (None, pruning):
            after = [continued_flops(shape, one, rows, start, end - start) for start, end in rest]
            if one is not None and refresh_of(model) is not None:
                after[-1] = replace(after[-1], probe=0)  # nothing is chosen after the last piece
            both += [prompt_flops(shape, one, rows, prefix), sum(after[1:], after[0])]
        dense, dense_rest, prompt, rest_of_it = both
        self.flops.append((dense + dense_rest, prompt + rest_of_it))
        self.after.append((dense_rest, rest_of_it))


class TaskScoring(Scoring):
    """Accuracies of multiple-choice tasks.

    FLOPs are those of whole rows: what a question's rows have in common counts for each of them. Where a dynamic method
    chooses on contexts, they are those of the two passes that it makes; the dense model's are counted the same way.
    """

    data: CommonsenseData

    def __init__(self, data: CommonsenseData, resume_file: Path | None, progress: Progress | None) -> None:
        super().__init__(data)
        self.results: TaskResults | None = None
        self.resume_file, self.progress = resume_file, progress

    def step(self, model: PreTrainedModel, batch: Any) -> None:
        """Evaluate every task."""
        self.results = evaluate_tasks(model, self.data, progress=self.progress, resume_file=self.resume_file)
        continues = self.data.choose_on == "context" and chooses_per_batch(model)
        for task in self.data.tasks:
            for choices in self.data.test_batches(task):
                if continues:
                    self._count_two_passes(model, with_prompts(choices))
                else:
                    self.count_flops(model, *choices["input_ids"].shape)

    def _count_two_passes(self, model: PreTrainedModel, batch: RowBatch) -> None:
        """Note the FLOPs of the contexts, each once, and of what follows them."""
        shape, pruning = shape_of(model.config), pruning_of(model)
        (contexts, past), (rows, tokens) = (one(batch).input_ids.shape for one in (beginnings, remainders))
        dense, actual = (
            (prompt_flops(shape, one, contexts, past), continued_flops(shape, one, rows, past, tokens))
            for one in (None, pruning)
        )
        self.flops.append((dense[0] + dense[1], actual[0] + actual[1]))
        self.after.append((dense[1], actual[1]))

    def figures(self) -> dict[str, Any]:
        """Accuracies of each task and their mean."""
        assert self.results is not None
        return {"tasks": self.results.as_dict()}


def scoring_for(
    data: EvaluationData,
    model: PreTrainedModel,
    tell: Tell | None,
    resume_file: Path | None = None,
    progress: Progress | None = None,
) -> Scoring:
    """The way to score this kind of data, once the model is pruned and in place.

    ``tell`` is for a model whose layers' weights stay on disk: it runs all batches together, where that can be. Tasks
    go on from ``resume_file``, and tell ``progress``.
    """
    if isinstance(data, CommonsenseData):
        return TaskScoring(data, resume_file, progress)
    assert isinstance(data, LanguageModelling)
    if data.protocol == "continuation":
        return ContinuationScoring(data, model.device)
    if tell is None or not goes_layer_by_layer(model):
        return TextScoring(data, model.device)
    return LayerwiseTextScoring(data, model.device, tell)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
