"""Seven commonsense tasks, scored by likelihood exactly as lm-evaluation-harness scores them."""

from pp_lightning.commonsense.datamodule import CommonsenseData
from pp_lightning.commonsense.evaluate import TaskResult, TaskResults, evaluate_tasks
from pp_lightning.commonsense.metric import MultipleChoice
from pp_lightning.commonsense.scoring import RowScores, score_batch
from pp_lightning.commonsense.tasks import TASK_NAMES, TASKS, Task

__all__ = [
    "TASKS",
    "TASK_NAMES",
    "CommonsenseData",
    "MultipleChoice",
    "RowScores",
    "Task",
    "TaskResult",
    "TaskResults",
    "evaluate_tasks",
    "score_batch",
]
