"""``pp-lightning compare --study``: rows that differ in one thing, over several seeds, and what is refused."""

import contextlib
import csv
import json
import re
import statistics
from pathlib import Path

import pytest
import torch

from pp_lightning.app import overlap, trainer
from pp_lightning.app.comparing import Row
from pp_lightning.app.overlap import Overlap
from pp_lightning.app.prunable import PrunableModule, PruningSettings
from pp_lightning.app.results import Comparison, Evaluation, FlopsRatios
from pp_lightning.app.studies import Study, study_named, study_names
from pp_lightning.app.trainer import PruningTrainer
from pp_lightning.data import LanguageModelling
from pp_lightning.errors import UserError
from pp_lightning.methods import FullBatchProbing, ProbePruning
from pp_lightning.pruning import KeptUnits
from tests.app.test_cli import refused
from tests.models import tiny


def rows_of(folder):
    record = json.loads((folder / "results.json").read_text())
    return {(row["method"], row["pruning_ratio"]): row for row in record["rows"]}


@pytest.mark.parametrize("name", study_names())
def test_studies_differ_in_their_rows_only(name):
    study = study_named(name)
    made = [json.dumps([one.method.label, one.method.settings(), one.model, one.data]) for one in study.rows]
    assert len(set(made)) == len(made) > 1
    assert study.title.endswith("?")
    assert re.search(rf"\b{name}[,;.]", PruningTrainer.compare.__doc__), "the help names it"


def test_a_question_after_a_prompt_leaves_something_to_score():
    study = study_named("prefix")
    fitting = study.fitting(LanguageModelling(window=256, protocol="continuation"))
    assert [one.data["prefix"] for one in fitting][:4] == [128, 16, 32, 64] and len(fitting) == 3 * 4
    whole = study.fitting(LanguageModelling(window=1024, protocol="continuation"))
    assert len(whole) == 3 * 6
    with pytest.raises(UserError, match="continuation"):
        study.fitting(LanguageModelling(window=256))


def test_rows_are_paired_by_seed():
    def of(*values):
        flops = FlopsRatios(0.7, 0.7, 0.0)
        return Evaluation.mean_of([Evaluation("a", 0.4, flops, perplexity=value) for value in values])

    # the seeds differ by far more than the rows: only pairs show that the difference is exact
    found = Comparison.of(of(10.0, 12.0, 17.0), of(8.0, 8.0, 8.0), of(11.0, 13.0, 18.0))
    assert found.evaluation.perplexity == 13.0 and found.degradation == 5.0
    assert found.evaluation.perplexity_error == pytest.approx(statistics.stdev([10, 12, 17]) / 3**0.5)
    assert (found.difference, found.difference_error) == (-1.0, 0.0)
    assert Comparison.of(of(10.0), of(8.0), of(11.0)).difference is None


@pytest.mark.slow
def test_a_study_is_compared_over_seeds(type_in, arguments, tmp_path):
    extra = ["--study", "methods", "--ratios", "[0.2,0.4]", "--seeds", "[0,5]", "--out", tmp_path]
    assert type_in("compare", arguments, extra=extra) == 0
    assert {path.name for path in tmp_path.iterdir()} == {f"results.{kind}" for kind in ("json", "csv", "md", "png")}
    rows = rows_of(tmp_path)
    assert len(rows) == 1 + 2 * 4
    published, best = rows["PP as published", 0.4], rows["PP, best (ours)", 0.4]
    assert "difference" not in published
    pairs = [a - b for a, b in zip(best["perplexities"], published["perplexities"], strict=True)]
    assert best["difference"] == pytest.approx(statistics.fmean(pairs))
    # calibration windows and drawn probes differ from seed to seed; full batches do not
    assert published["perplexities"][0] != published["perplexities"][1]
    full = rows["Full-Batch Probing", 0.4]
    assert full["perplexities"][0] == full["perplexities"][1]
    assert best["settings"]["compensation"] == "probe"
    assert best["flops_ratio"] < 1 < full["flops_ratio"] + 0.2
    assert len(list(csv.DictReader((tmp_path / "results.csv").open()))) == len(rows)
    table = (tmp_path / "results.md").read_text()
    assert "What do the published method" in table and "above the first" in table
    assert "±" in table and "batch 4 x 32" in table and "float32" in table


@pytest.mark.slow
def test_a_study_measures_what_the_methods_do(type_in, arguments, tmp_path):
    extra = ["--ratios", "[0.4]", "--methods", "[pp,full_batch,ppsp,best]", "--study", "methods", "--out", tmp_path]
    assert type_in("compare", arguments, extra=extra) == 0
    rows = list(rows_of(tmp_path).values())[1:]
    named, studied = rows[:4], rows[4:]
    assert [row["perplexity"] for row in named] == [row["perplexity"] for row in studied]
    assert [row["flops_ratio"] for row in named] == [row["flops_ratio"] for row in studied]


def given(monkeypatch, **known):
    monkeypatch.setattr(trainer, "study_named", lambda name: known[name])
    monkeypatch.setattr("pp_lightning.app.commands.study_named", lambda name: known[name])


@pytest.mark.slow
def test_a_study_of_overlap_shows_each_layer(type_in, arguments, tmp_path, monkeypatch):
    study = Study("How?", [Row("pp", ProbePruning()), Row("full", FullBatchProbing())], overlap=True)
    given(monkeypatch, overlap=study)
    extra = ["--study", "overlap", "--ratios", "[0.4]", "--seeds", "[0,1]", "--out", tmp_path]
    assert type_in("compare", arguments, extra=extra) == 0
    dense, pp, full = rows_of(tmp_path).values()
    assert "overlap" not in dense
    assert set(pp["overlap"]) == {f"{layer}.{block}" for layer in (2, 3, 4) for block in ("attention", "mlp")}
    assert all(0 < share < 1 for name, share in pp["overlap"].items() if "mlp" in name)
    assert set(full["overlap"].values()) == {1.0}
    table = (tmp_path / "results.md").read_text()
    assert "Units shared with Full-Batch Probing" in table and "| 2.mlp |" in table


def test_overlap_is_intersection_over_union(monkeypatch):
    """Of units that a model was said to keep, batch by batch."""
    heads, module = torch.tensor([0]), PrunableModule(tiny("llama"), None, PruningSettings(0.4))
    found, batches = Overlap(), []
    monkeypatch.setattr(overlap, "is_pruned", lambda model: True)
    monkeypatch.setattr(overlap, "kept_units", lambda model: batches.pop(0))

    def run(*channels):
        found.on_test_start(None, module)
        batches.extend({2: KeptUnits(heads, torch.tensor(own))} for own in channels)
        for _ in channels:
            found.on_test_batch_end(None, module)

    run([0, 1, 2], [0, 1])
    assert found.shares("key", lambda: run([1, 2, 3], [0, 1])) == {"2.attention": 1.0, "2.mlp": 0.75}
    run([2, 3, 4], [1])
    assert found.shares("key", lambda: pytest.fail("it was run before")) == {"2.attention": 1.0, "2.mlp": 0.5}


@pytest.mark.slow
def test_rows_put_back_what_is_their_own(type_in, arguments, tmp_path, monkeypatch):
    """A row's settings of the model and of the data are not the next row's."""
    seen, real = [], PruningTrainer.test

    def test(self, model, datamodule, **given):
        settings = model.settings
        seen.append((model.label, settings.allocation, tuple(settings.skip_layers), datamodule.batch_size))
        return real(self, model, datamodule=datamodule, **given)

    monkeypatch.setattr(PruningTrainer, "test", test)
    rows = [
        Row("a", ProbePruning()),
        Row("b", ProbePruning(), model={"allocation": "uniform", "skip_layers": []}),
        Row("c", ProbePruning(), data={"batch_size": 2}),
    ]
    given(monkeypatch, mine=Study("How?", rows))
    extra = ["--study", "mine", "--ratios", "[0.4]", "--out", tmp_path]
    assert type_in("compare", arguments, extra=extra) == 0
    assert seen == [
        ("dense", None, (0, 1), 4),
        ("dense, batch_size 2", None, (0, 1), 2),
        ("a", None, (0, 1), 4),
        ("b", "uniform", (), 4),
        ("c", None, (0, 1), 2),
    ]
    found = rows_of(tmp_path)
    for name, dense in (("a", "dense"), ("c", "dense, batch_size 2")):
        row = found[name, 0.4]
        assert row["degradation"] == row["perplexity"] - found[dense, 0.0]["perplexity"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--study", "speed"], "there is no study 'speed'"),
        (["--study", "probe"], "did you mean"),
        (["--study", "prefix"], "need --data.protocol continuation"),
        (["--study", "methods", "--data.protocol", "paper"], "protocol contiguous"),
        (["--study", "methods", "--seeds", "[0]", "--model.statistics", "file"], "leave model.statistics"),
        (["--study", "allocation", "--ratios", "[0.4]", "--model.floor", "0.9"], "lower floor or pruning_ratio"),
    ],
)
def test_mistakes_are_one_line(type_in, arguments, capsys, tmp_path, extra, message):
    assert type_in("compare", arguments, extra=[*extra, "--out", tmp_path / "out"]) == 2
    assert message in refused(capsys)
    assert not (tmp_path / "out").exists()


def interrupted_after(number, monkeypatch):
    """Measurements that are begun, in order; the one after ``number`` is interrupted."""
    begun = []

    def test(trainer, model, *, real=PruningTrainer.test, **given):
        if len(begun) == number:
            raise KeyboardInterrupt
        begun.append(model.label)
        return real(trainer, model, **given)

    monkeypatch.setattr(PruningTrainer, "test", test)
    return begun


@pytest.mark.slow
def test_an_interrupted_study_goes_on_where_it_stopped(type_in, arguments, tmp_path, monkeypatch):
    rows = [Row("pp", ProbePruning()), Row("b", ProbePruning(row_ratio=0.5))]
    given(monkeypatch, mine=Study("How?", rows, overlap=True))
    asked = ["--study", "mine", "--ratios", "[0.4]", "--seeds", "[0,1]"]

    def figures(folder):
        return {key: (row["perplexity"], row.get("overlap")) for key, row in rows_of(folder).items()}

    with monkeypatch.context() as patch:
        every = interrupted_after(1000, patch)
        assert type_in("compare", arguments, extra=[*asked, "--out", tmp_path / "whole"]) == 0
    assert every.count("dense") == 1  # the seed has no part in it
    with monkeypatch.context() as patch:
        interrupted_after(4, patch)
        with contextlib.suppress(KeyboardInterrupt):
            assert type_in("compare", arguments, extra=[*asked, "--out", tmp_path / "cut"]) != 0
    [unfinished] = (tmp_path / "cut").iterdir()
    other = [*asked, "--model.round_to", 32, "--out", tmp_path / "cut"]
    assert type_in("compare", arguments, extra=other) == 2  # figures of other settings are not mixed in
    with monkeypatch.context() as patch:
        rest = interrupted_after(1000, patch)
        assert type_in("compare", arguments, extra=[*asked, "--out", tmp_path / "cut"]) == 0
    assert len(rest) < len(every) and "dense" not in rest
    assert figures(tmp_path / "cut") == figures(tmp_path / "whole")
    assert not unfinished.exists()


def test_studies_of_the_documents_are_there():
    named = re.findall(r"--study ([a-z]\w*)", (Path(__file__).parents[2] / "docs" / "beyond.md").read_text())
    assert named and set(named) <= set(study_names())
