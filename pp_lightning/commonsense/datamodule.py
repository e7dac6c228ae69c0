"""The LightningDataModule of the commonsense tasks: questions to test on, text to calibrate on."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from pp_lightning.commonsense.batching import ChoiceBatch, collate_questions, group_questions, longest_context_first
from pp_lightning.commonsense.encoding import EncodedQuestion, encode_questions
from pp_lightning.commonsense.reading import digest, read_questions
from pp_lightning.commonsense.rows import Question
from pp_lightning.commonsense.scoring import ChooseOn
from pp_lightning.commonsense.tasks import TASK_NAMES, task_named
from pp_lightning.data.base import EvaluationData
from pp_lightning.data.training import TrainingRows
from pp_lightning.errors import UserError
from pp_lightning.methods.options import checked
from pp_lightning.texts.sources import C4, TextSource


class CommonsenseData(EvaluationData):
    """Seven zero-shot multiple-choice tasks, scored by likelihood as lm-evaluation-harness does.

    Args:
        path: a folder with the tasks' original files, ``path/<task>/<file>``; none loads them from the hub.
        tasks: which tasks, in this order; none takes all seven.
        calibration: the text that the pruning statistics are collected on.
        window: tokens that the model is run on at most; longer contexts lose tokens on the left, and are counted. Also
            the length of the calibration windows, since a history covers the positions it was calibrated on. None takes
            512, as the paper does; lm-evaluation-harness takes the model's whole length unless given ``max_length``.
        batch_size: N, rows (choices) of a batch at most; a batch holds whole questions. Dynamic pruning chooses per
            batch, so this is part of the result.
        longest_first: batch questions of similar length together, longest first, which wastes little on padding. False
            keeps the order of the data set, as the published code does; dense and static models score the same.
        choose_on: what a dynamic method chooses on: ``row``, the whole rows of a batch, or ``context``, their contexts
            without their last token. Its choice is then held while that token and the continuations are run, and
            questions are batched by the length of their contexts, not of their rows.
        limit: only the first rows of each task; none takes all.
        calibration_samples: calibration windows; none takes 512 on an accelerator and 64 on a CPU. The paper uses 2000.
        seed: of the calibration windows, and of the order of training rows.
        train: texts or rows that models with recovery are trained on.
    """

    usual_window = 512

    def __init__(
        self,
        path: str | None = None,
        tasks: list[str] | None = None,
        calibration: TextSource | None = None,
        window: int | None = None,
        batch_size: int = 20,
        longest_first: bool = True,
        limit: int | None = None,
        calibration_samples: int | None = None,
        seed: int = 0,
        train: list[TextSource] | TrainingRows | None = None,
        choose_on: ChooseOn = "row",
    ) -> None:
        super().__init__(calibration or C4(), calibration_samples, window, batch_size, seed, train)
        if limit is not None and limit < 1:
            raise UserError("limit must be at least 1")
        self.path = path
        self.tasks = list(TASK_NAMES if tasks is None else tasks)
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise UserError("tasks must name at least one task, and none twice")
        for name in self.tasks:
            task_named(name)
        self.longest_first = longest_first
        self.choose_on: ChooseOn = checked("choose_on", choose_on, ("row", "context"))
        self.limit = limit
        self._questions: dict[str, list[Question]] = {}
        self._groups: dict[str, list[list[EncodedQuestion]]] = {}

    def use_tokenizer(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int | None = None) -> None:
        """Tokenise with ``tokenizer`` from now on, as for all data."""
        if tokenizer is not self._tokenizer:
            self._groups.clear()
        super().use_tokenizer(tokenizer, vocabulary)

    def questions(self, task: str) -> list[Question]:
        """A task's questions in the order of its rows; read once."""
        if task not in self._questions:
            questions = read_questions(task_named(task), self.path, self.limit)
            for other, theirs in self._questions.items():
                if digest(theirs) == digest(questions):
                    raise UserError(f"{questions[0].origin}: these are the rows of {other}, not of {task}")
            self._questions[task] = questions
        return self._questions[task]

    def check_refresh(self, refresh: int | None) -> None:
        """Refuse a model that would choose again by the tokens of answers."""
        if refresh is not None and self.choose_on == "context":
            raise UserError("refresh would choose by the tokens of answers: leave it out with choose_on=context")

    def num_batches(self, task: str, rank: int = 0, world: int = 1) -> int:
        """How many batches :meth:`test_batches` has."""
        return len(self.groups(task, rank, world))

    def test_batches(self, task: str, rank: int = 0, world: int = 1) -> Iterator[ChoiceBatch]:
        """A task's batches in order, or one process's share: every batch once over all processes, none twice."""
        for group in self.groups(task, rank, world):
            yield collate_questions(group, self._pad_id)

    def test_dataloader(self) -> DataLoader[list[str]]:
        """One item, the names of the tasks: ``evaluate_tasks`` does the rest in one step, so that it can resume."""
        return DataLoader([self.tasks], batch_size=None)  # type: ignore[arg-type]

    def evaluation_settings(self) -> dict[str, Any]:
        """Everything that the scores depend on beside the model: window, batches, and a digest of each task's rows."""
        longest = "context" if self.choose_on == "context" else "question"
        return {
            "window": self.window,
            "batch_size": self.batch_size,
            "order": f"longest {longest} first" if self.longest_first else "as in the data set",
            "choose_on": self.choose_on,
            "limit": self.limit,
            "tasks": {task: self._describe_task(task) for task in self.tasks},
        }

    def describe(self) -> dict[str, Any]:
        """Settings and digests of rows and calibration text, for ``results.json``."""
        return {**self.evaluation_settings(), "calibration": self.describe_calibration()}

    def _describe_task(self, name: str) -> dict[str, Any]:
        task, questions = task_named(name), self.questions(name)
        source = str(task.hub) if self.path is None else f"{self.path}/{task.name}/{task.file}"
        return {"source": source, "questions": len(questions), "sha256": digest(questions)}

    def groups(self, task: str, rank: int = 0, world: int = 1) -> list[list[EncodedQuestion]]:
        """The questions of a task's batches in order, or those of one process's share."""
        if task not in self._groups:
            encoded = encode_questions(self.tokenizer, self.questions(task), self.window)
            self._known([token for one in encoded for row in one.rows for token in (*row.inputs, *row.continuation)])
            by_row = self.longest_first and self.choose_on == "row"
            if self.longest_first and not by_row:
                encoded = longest_context_first(encoded)
            self._groups[task] = group_questions(encoded, self.batch_size, longest_first=by_row)
        return self._groups[task][rank::world]
