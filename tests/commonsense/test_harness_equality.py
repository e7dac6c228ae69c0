"""Dense scores equal lm-evaluation-harness's own, row by row, for all tasks and three kinds of tokenizers."""

import os
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from pp_lightning.commonsense import TASK_NAMES, MultipleChoice, RowScores, evaluate_tasks, score_batch
from tests.commonsense.samples import data_of, tiny_model, write_samples
from tests.commonsense.tokenizers import KINDS, tokenizer_of

pytest.importorskip("lm_eval", reason="needs the extra: pip install pp-lightning[eval]")

from tests.commonsense.harness_tasks import harness_results, sample_scores, write_definitions

WINDOW = 384  # every choice fits, but not every BoolQ passage: truncation is compared too


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def commonsense_folder() -> Path:
    folder = Path(os.environ.get("PP_LIGHTNING_DATA", "/nowhere")) / "data" / "commonsense"
    if not folder.is_dir():
        pytest.skip("set PP_LIGHTNING_DATA to a folder with data/commonsense in it")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_made_up_rows_score_as_in_the_harness(kind: str, tmp_path: Path) -> None:
    check_equal(write_samples(tmp_path / "data"), kind, tmp_path, limit=10, window=40)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_real_rows_score_as_in_the_harness(kind: str, tmp_path: Path) -> None:
    check_equal(commonsense_folder(), kind, tmp_path, limit=25, window=WINDOW)


@pytest.mark.slow
def test_all_local_rows_score_as_in_the_harness(tmp_path: Path) -> None:
    """With one tokenizer: the tests above have every task with every one."""
    check_equal(commonsense_folder(), "metaspace", tmp_path, limit=10_000, window=WINDOW)


def check_equal(folder: Path, kind: str, scratch: Path, *, limit: int, window: int) -> None:
    model = tiny_model(kind)
    definitions = write_definitions(scratch, folder, limit)
    theirs = harness_results(model, tokenizer_of(kind), definitions, window)
    data = data_of(folder, kind, window=window, limit=limit, batch_size=20)
    ours = evaluate_tasks(model, data)
    for name in TASK_NAMES:
        expected = torch.tensor([s for question in sample_scores(theirs, name) for s in question], dtype=torch.float64)
        # The harness adds up in float32: 1e-4, or the spacing of float32 where a sum is beyond -500.
        torch.testing.assert_close(row_scores(model, data, name), expected, atol=1e-4, rtol=2e-7)
        check_accuracies(
            ours.tasks[name],
            theirs["results"][f"local_{name}"],
            ("acc",) if name in ("boolq", "winogrande") else ("acc", "acc_norm"),
        )
    assert ours.tasks["boolq"].cut_rows > 0


def check_accuracies(ours: Any, theirs: dict[str, float], metrics: tuple[str, ...]) -> None:
    assert {key.split(",")[0] for key in theirs if key.endswith(",none")} >= set(metrics)
    for metric in metrics:
        assert getattr(ours, metric) == theirs[f"{metric},none"]
        assert getattr(ours, f"{metric}_stderr") == pytest.approx(theirs[f"{metric}_stderr,none"], rel=1e-12)
    assert ("acc_norm" in metrics) == ("acc_norm,none" in theirs)


def row_scores(model: Any, data: Any, task: str) -> torch.Tensor:
    """Scores of all rows in the order of the data set."""
    in_order = copy(data)
    in_order.longest_first = False
    in_order.use_tokenizer(deepcopy(data.tokenizer))  # what was cut for the other order is not read again
    scores = [score_batch(model, batch).log_likelihood for batch in in_order.test_batches(task)]
    return torch.cat(scores)


def test_the_comparison_can_fail() -> None:
    """Negative control of `check_accuracies`: another accuracy does not pass."""
    metric = MultipleChoice()
    batch: Any = {
        "row_question": torch.tensor([0, 0]),
        "gold": torch.tensor([0]),
        "row_characters": torch.tensor([1, 1]),
        "cut_rows": torch.tensor(0),
    }
    metric.update(RowScores(torch.tensor([-1.0, -2.0]), torch.tensor([1, 1])), batch)
    result = type("Result", (), metric.compute())
    with pytest.raises(AssertionError):
        check_accuracies(result, {"acc,none": 0.0, "acc_stderr,none": 0.0}, ("acc",))
