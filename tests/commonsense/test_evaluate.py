"""Evaluating, being interrupted, and going on; and the data module under a Trainer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pp_lightning import UserError, calibrate, prune_, pruning_state
from pp_lightning.commonsense import TASK_NAMES, CommonsenseData, evaluate_tasks
from pp_lightning.data import Embedded
from pp_lightning.methods import FLAP, ProbePruning
from pp_lightning.state import digest_of
from tests.commonsense.samples import ROWS, data_of, tiny_model, write_samples
from tests.commonsense.tokenizers import TEXT, tokenizer_of


def pruned(method: Any = None, seed: int = 0) -> Any:
    model = tiny_model("metaspace")
    ids = torch.tensor(tokenizer_of("metaspace")("\n".join(TEXT[seed:]))["input_ids"][: 8 * 64]).view(8, 64)
    stats = calibrate(model, [{"input_ids": ids}], progress=False)
    prune_(model, method or ProbePruning(momentum=0.5), stats, pruning_ratio=0.4, skip_layers=[0], round_to=8)
    return model


def plain(results: Any) -> dict[str, Any]:
    """Results without what differs from run to run."""
    found = results.as_dict()
    for task in found["tasks"].values():
        assert task.pop("seconds") >= 0
    return found


def test_all_questions_and_rows_count(tmp_path: Path) -> None:
    results = evaluate_tasks(tiny_model("metaspace"), data_of(write_samples(tmp_path), "metaspace", window=40))
    assert list(results.tasks) == list(TASK_NAMES)
    assert {name: task.questions for name, task in results.tasks.items()} == {n: len(r) for n, r in ROWS.items()}
    assert results.tasks["arc_easy"].rows == 4 + 3 + 5
    assert results.tasks["boolq"].cut_rows == 2 == results.cut_rows
    mean = sum(task.acc for task in results.tasks.values()) / 7
    error = sum(float(task.acc_stderr or 0) ** 2 for task in results.tasks.values()) ** 0.5 / 7
    assert results.mean["acc"] == pytest.approx(mean) and results.mean["acc_stderr"] == pytest.approx(error)
    assert results.settings["batch_size"] == 8 and results.settings["order"] == "longest question first"
    json.dumps(results.as_dict(), allow_nan=False)


def test_a_single_question_has_no_standard_error(tmp_path: Path) -> None:
    results = evaluate_tasks(tiny_model("opt"), data_of(write_samples(tmp_path), "opt", limit=1))
    assert all(task.acc_stderr is None for task in results.tasks.values())
    assert results.mean["acc_norm_stderr"] is None
    json.dumps(results.as_dict(), allow_nan=False)


@pytest.mark.parametrize("after", ["piqa", "winogrande"])
def test_an_interrupted_evaluation_goes_on_at_its_task(after: str, tmp_path: Path) -> None:
    data, file = data_of(write_samples(tmp_path / "data"), "metaspace"), tmp_path / "out" / "resume.json"
    whole = plain(evaluate_tasks(pruned(), data))

    def interrupt(task: str, done: int, _: int) -> None:
        if task == after and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_tasks(pruned(), data, progress=interrupt, resume_file=file)
    before = list(TASK_NAMES[: TASK_NAMES.index(after)])
    assert list(json.loads(file.read_text())["results"]) == before

    seen: list[str] = []
    resumed = evaluate_tasks(pruned(), data, progress=lambda task, *_: seen.append(task), resume_file=file)
    assert list(dict.fromkeys(seen)) == list(TASK_NAMES[len(before) :])
    assert plain(resumed) == whole
    assert [path.name for path in file.parent.iterdir()] == ["resume.json"]
    again = evaluate_tasks(pruned(), data, progress=lambda *_: pytest.fail("nothing is left to do"), resume_file=file)
    assert plain(again) == whole


def test_an_interrupted_model_is_left_as_it_was(tmp_path: Path) -> None:
    data, model = data_of(write_samples(tmp_path), "metaspace"), pruned().train()
    start = digest_of(pruning_state(model))

    def interrupt(task: str, done: int, _: int) -> None:
        if done == 1:
            assert digest_of(pruning_state(model)) != start  # negative control: batches do move the histories
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_tasks(model, data, progress=interrupt)
    assert digest_of(pruning_state(model)) == start and model.training


def test_tasks_do_not_depend_on_one_another(tmp_path: Path) -> None:
    """Histories start over with each task, though they move within it."""
    folder = write_samples(tmp_path)
    both = evaluate_tasks(pruned(), data_of(folder, "metaspace", tasks=["piqa", "arc_easy"]))
    model = pruned()
    for _ in range(2):
        alone = evaluate_tasks(model, data_of(folder, "metaspace", tasks=["arc_easy"]))
        assert vars(alone.tasks["arc_easy"]) | {"seconds": 0} == vars(both.tasks["arc_easy"]) | {"seconds": 0}


METHODS = {
    "paper": ProbePruning,
    "best": ProbePruning.best,
    "history": lambda: ProbePruning(compensation="history"),
    "random": lambda: ProbePruning(rank_by="random"),
}


@pytest.mark.parametrize("method", METHODS)
def test_twice_and_interrupted_at_every_task(method: str, tmp_path: Path) -> None:
    """Histories, running means and the number that random samples are drawn by all start over."""
    data, model = data_of(write_samples(tmp_path / "data"), "metaspace"), pruned(METHODS[method]())
    whole = plain(evaluate_tasks(model, data))
    assert plain(evaluate_tasks(model, data)) == whole
    for stop in TASK_NAMES:

        def interrupt(task: str, done: int, _: int, stop: str = stop) -> None:
            if task == stop and done == 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            evaluate_tasks(model, data, progress=interrupt, resume_file=tmp_path / "resume.json")
    assert plain(evaluate_tasks(model, data, resume_file=tmp_path / "resume.json")) == whole


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 9}, "other batch_size"),
        ({"window": 50}, "other window"),
        ({"limit": 1}, "other limit, tasks"),
        ({"longest_first": False}, "other order"),
        ({"tasks": ["boolq"]}, "other tasks"),
    ],
)
def test_a_file_of_other_settings_is_refused(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    folder, file, model = write_samples(tmp_path / "data"), tmp_path / "resume.json", tiny_model("metaspace")
    evaluate_tasks(model, data_of(folder, "metaspace"), resume_file=file)
    with pytest.raises(UserError, match=rf"belongs to another evaluation \({named}\): remove it"):
        evaluate_tasks(model, data_of(folder, "metaspace", **change), resume_file=file)


def test_a_file_of_another_model_method_or_calibration_is_refused(tmp_path: Path) -> None:
    data, file = data_of(write_samples(tmp_path / "data"), "metaspace", tasks=["piqa"]), tmp_path / "resume.json"
    evaluate_tasks(pruned(), data, resume_file=file)
    others = [tiny_model("metaspace"), pruned(FLAP()), pruned(ProbePruning(momentum=0.6)), pruned(seed=300)]
    for model in others:
        with pytest.raises(UserError, match=r"another evaluation \(other model\)"):
            evaluate_tasks(model, data, resume_file=file)
    evaluate_tasks(pruned(), data, resume_file=file)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "other"}'])
def test_a_damaged_file_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "resume.json").write_text(content)
    data = data_of(write_samples(tmp_path / "data"), "metaspace", tasks=["piqa"])
    with pytest.raises(UserError, match="remove it or name another file"):
        evaluate_tasks(tiny_model("metaspace"), data, resume_file=tmp_path / "resume.json")


def test_all_rows_are_checked_before_the_model_runs(tmp_path: Path) -> None:
    rows: list[Any] = [dict(row) for row in ROWS["openbookqa"]]
    del rows[-1]["answerKey"]
    data = data_of(write_samples(tmp_path, openbookqa=rows), "metaspace")
    with pytest.raises(UserError, match=r"openbookqa.test.jsonl, line 2: the row has no answer"):
        evaluate_tasks(tiny_model("metaspace"), data, progress=lambda *_: pytest.fail("the model was run"))
    with pytest.raises(UserError, match="window of 2000 tokens exceeds"):
        evaluate_tasks(tiny_model("metaspace"), data_of(tmp_path, "metaspace", window=2000))


def test_every_batch_goes_to_one_process(tmp_path: Path) -> None:
    data = data_of(write_samples(tmp_path), "opt", batch_size=5)
    for task in data.tasks:
        whole = [batch["input_ids"].tolist() for batch in data.test_batches(task)]
        shares = [batch["input_ids"].tolist() for rank in range(3) for batch in data.test_batches(task, rank, 3)]
        assert sorted(shares) == sorted(whole)
        assert sum(data.num_batches(task, rank, 3) for rank in range(3)) == len(whole)


def test_calibration_and_description(tmp_path: Path) -> None:
    folder = str(write_samples(tmp_path))
    data = CommonsenseData(folder, calibration=Embedded("calibration"), calibration_samples=5, batch_size=4)
    data.use_tokenizer(tokenizer_of("metaspace"))
    assert data.describe()["calibration"] is None
    batches = data.calibration_batches()
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(4, 512), (1, 512)]
    described = data.describe()
    json.dumps(described)
    assert described["tasks"]["piqa"]["source"] == f"{folder}/piqa/valid.jsonl"
    assert described["tasks"]["piqa"]["questions"] == 3 and len(described["tasks"]["piqa"]["sha256"]) == 64
    assert described["calibration"]["source"] == "Embedded" and described["window"] == 512
    assert "calibration" not in data.evaluation_settings()
