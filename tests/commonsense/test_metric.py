"""The accuracies, their standard errors, and questions spread over processes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from pp_lightning.commonsense import MultipleChoice, RowScores, evaluate_tasks
from pp_lightning.commonsense.metric import accuracy_stderr, choose
from tests.commonsense.samples import ROWS, data_of, tiny_model, write_samples


def batch(owners: list[int], gold: list[int], characters: list[int], cut: int = 0) -> Any:
    return {
        "row_question": torch.tensor(owners),
        "gold": torch.tensor(gold),
        "row_characters": torch.tensor(characters),
        "cut_rows": torch.tensor(cut),
    }


def scores(values: list[float], tokens: list[int]) -> RowScores:
    return RowScores(torch.tensor(values, dtype=torch.float64), torch.tensor(tokens))


def test_three_normalisations_choose_differently() -> None:
    metric = MultipleChoice()
    rows = scores([-4.0, -6.0, -9.0], [1, 2, 9])  # per token -4, -3, -1; per character -2, -0.5, -1
    for gold in range(3):
        metric.update(rows, batch([0, 0, 0], [gold], [2, 12, 9], cut=gold))
    result = metric.compute()
    assert (result["acc"], result["acc_norm"], result["acc_token"]) == (1 / 3,) * 3
    assert (result["questions"], result["rows"], result["cut_rows"]) == (3, 9, 3)
    for gold, name in enumerate(("acc", "acc_norm", "acc_token")):
        metric.reset()
        metric.update(rows, batch([0, 0, 0], [gold], [2, 12, 9]))
        found = metric.compute()
        assert found[name] == 1.0
        assert sum(found[other] for other in ("acc", "acc_norm", "acc_token")) == 1.0


def test_questions_with_different_numbers_of_choices() -> None:
    values = torch.tensor([-3.0, -1.0, -2.0, -5.0, -4.0, -3.0, -1.5, -1.0, -2.0, -1.0, -3.0])
    owners = torch.tensor([0] * 2 + [1] * 5 + [2] + [3] * 3)
    assert choose(values, owners, 4).tolist() == [1, 4, 0, 1]


def test_the_first_of_equals_wins() -> None:
    assert choose(torch.tensor([-2.0, -1.0, -1.0, -3.0, -3.0]), torch.tensor([0, 0, 0, 1, 1]), 2).tolist() == [1, 0]


@pytest.mark.parametrize("correct", [0, 1, 7, 13])
def test_the_standard_error_is_that_of_the_sample(correct: int) -> None:
    values = torch.tensor([1.0] * correct + [0.0] * (13 - correct), dtype=torch.float64)
    expected = float(values.std(correction=1)) / math.sqrt(13)
    assert accuracy_stderr(correct / 13, 13) == pytest.approx(expected, abs=1e-12)
    assert math.isnan(accuracy_stderr(1.0, 1))


def test_batches_may_be_cut_anywhere() -> None:
    generator = torch.Generator().manual_seed(0)
    values, gold = torch.randn(30, 4, generator=generator), torch.randint(0, 4, (30,), generator=generator)
    results = []
    for size in (1, 7, 30):
        metric = MultipleChoice()
        for part, right in zip(values.split(size), gold.split(size), strict=True):
            owners = torch.arange(len(part)).repeat_interleave(4).tolist()
            rows = scores(part.flatten().tolist(), [1, 2, 3, 4] * len(part))
            metric.update(rows, batch(owners, right.tolist(), [5, 1, 2, 9] * len(part)))
        results.append(metric.compute())
    assert results[0] == results[1] == results[2]
    assert results[0]["acc"] == float((values.argmax(1) == gold).double().mean())


def evaluate_on(rank: int, world: int, folder: Path) -> None:
    """One process of a group: what it evaluates, and the result that it sees."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    data = data_of(folder / "data", "metaspace", batch_size=5)
    batches: list[tuple[str, int]] = []
    resume = folder / "resume.json"
    results = evaluate_tasks(
        tiny_model("metaspace"), data, progress=lambda task, done, _: batches.append((task, done)), resume_file=resume
    )
    tasks = {name: {**vars(result), "seconds": 0} for name, result in results.tasks.items()}
    torch.save((tasks, batches), folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    data = data_of(write_samples(tmp_path / "data"), "metaspace", batch_size=5)
    alone = evaluate_tasks(tiny_model("metaspace"), data)
    expected = {name: {**vars(result), "seconds": 0} for name, result in alone.tasks.items()}
    mp.start_processes(evaluate_on, (2, tmp_path), nprocs=2, start_method="fork")
    shares = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert shares[0][0] == shares[1][0] == expected
    for name, rows in ROWS.items():
        assert expected[name]["questions"] == len(rows)
        done = [sum(1 for task, number in batches if task == name and number) for _, batches in shares]
        assert sum(done) == data.num_batches(name) and min(done) > 0
    assert (tmp_path / "resume.json").exists()
