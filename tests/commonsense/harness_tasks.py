"""lm-evaluation-harness's own task definitions over local rows, without its data sets and without a network."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tests.commonsense.samples import FILES

DEFINITIONS = {
    "boolq": "super_glue/boolq/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
}


class GivenTasks(TaskManager):
    """Without the harness's own tasks: it looks at 14,000 files of them on every start."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given, include_defaults=False)


def write_definitions(folder: Path, data: Path, limit: int) -> Path:
    """YAML files that include the harness's and point them at the first rows of local files, in the hub's format."""
    tasks = Path(lm_eval.__file__).parent / "tasks"
    for name, definition in DEFINITIONS.items():
        rows = folder / f"{name}.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in as_on_the_hub(name, data)[:limit]))
        split = "test" if FILES[name].startswith("test") else "validation"
        lines = [
            f"include: {tasks / definition}",
            f"task: local_{name}",
            "dataset_path: json",
            "dataset_name: null",
            "training_split: null",
            f"validation_split: {'validation' if split == 'validation' else 'null'}",
            f"dataset_kwargs: {{data_files: {{{split}: {rows}}}, cache_dir: {folder / 'cache'}}}",
        ]
        (folder / f"local_{name}.yaml").write_text("\n".join(lines) + "\n")
    return folder


def as_on_the_hub(task: str, data: Path) -> list[dict[str, Any]]:
    """The local rows as the harness's data sets store them. Written for the tests, apart from the library's reading."""
    rows = [json.loads(line) for line in (data / task / FILES[task]).read_text().splitlines()]
    labels = iter((data / "piqa" / "valid-labels.lst").read_text().split())
    convert: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "boolq": lambda r: {
            "passage": r["passage"],
            "question": r["question"],
            "label": int(r.get("answer", r.get("label"))),
        },
        "piqa": lambda r: {**r, "label": int(next(labels))},
        "hellaswag": lambda r: {**r, "label": str(r["label"])},
        "openbookqa": partial(_flat, stem="question_stem"),
    }
    convert |= {name: partial(_flat, stem="question") for name in ("arc_easy", "arc_challenge")}
    return [convert.get(task, dict)(row) for row in rows]


def _flat(row: dict[str, Any], stem: str) -> dict[str, Any]:
    choices = row["question"]["choices"]
    columns = {"text": [c["text"] for c in choices], "label": [c["label"] for c in choices]}
    return {"id": row["id"], stem: row["question"]["stem"], "choices": columns, "answerKey": row["answerKey"]}


def harness_results(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, definitions: Path, window: int
) -> dict[str, Any]:
    """What ``lm_eval`` with its own HFLM says about all seven local tasks, samples included."""
    from lm_eval.models.huggingface import HFLM

    language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=7, max_length=window)
    manager = TaskManager(include_path=str(definitions), include_defaults=False)
    names = [f"local_{name}" for name in DEFINITIONS]
    return lm_eval.simple_evaluate(model=language_model, tasks=names, task_manager=manager, bootstrap_iters=1000)


def sample_scores(results: dict[str, Any], name: str) -> list[list[float]]:
    """Log-likelihoods of every choice of every question, in the order of the rows."""
    samples = sorted(results["samples"][f"local_{name}"], key=lambda sample: sample["doc_id"])
    return [[float(response[0]) for response in sample["filtered_resps"]] for sample in samples]
