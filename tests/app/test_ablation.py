"""``pp-lightning ablate``: what is measured, what is compared with what, and what is refused."""

import contextlib
import csv
import json
import statistics

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pp_lightning.app.ablation import report
from pp_lightning.app.ablation.answers import Answer, Mean, Run
from pp_lightning.app.ablation.questions import QUESTIONS, Question, Variant
from pp_lightning.app.ablation.runner import UNFINISHED, Bench
from pp_lightning.app.report import perplexity_axis
from pp_lightning.app.trainer import PruningTrainer
from pp_lightning.methods import FullBatchProbing, ProbePruning, PruningMethod
from pp_lightning.resume import ResumeFile
from tests.app.test_cli import refused

OUTPUT = {"ablation.json", "ablation.csv", "ablation.md"}


def variant(label="a", **settings):
    return Variant(label, lambda seed: ProbePruning(seed=seed, **settings))


@pytest.mark.parametrize("name", QUESTIONS)
def test_questions_differ_in_their_variants_only(name):
    question = QUESTIONS[name]
    labels = [variant.label for variant in question.variants]
    assert len(set(labels)) == len(labels) > 1
    made = [variant.method(3) for variant in question.variants]
    assert all(isinstance(method, PruningMethod) for method in made)
    assert all(method.seed == 3 for method in made if isinstance(method, ProbePruning))
    assert (question.axis is not None) == all(variant.x is not None for variant in question.variants)
    different = {
        json.dumps([m.label, m.settings(), v.allocation, v.skip_layers, v.refresh, dict(v.data)])
        for m, v in zip(made, question.variants, strict=True)
    }
    assert len(different) == len(made)


def test_means_and_paired_differences():
    runs = [Run(0, 10.0, 8.0, 5, 0.7), Run(1, 12.0, 8.0, 5, 0.7), Run(2, 17.0, 8.0, 5, 0.7)]
    first = [Run(0, 11.0, 8.0, 5, 0.7), Run(1, 13.0, 8.0, 5, 0.7), Run(2, 18.0, 8.0, 5, 0.7)]
    answer = Answer.of("q", variant(), 0.4, runs, first, None)
    assert answer.perplexity.value == 13.0
    assert answer.perplexity.error == pytest.approx(statistics.stdev([10, 12, 17]) / 3**0.5)
    # the seeds differ by far more than the variants: only pairs show that the difference is exact
    assert answer.difference == Mean(-1.0, 0.0)
    assert answer.degradation == pytest.approx(5 / 6)
    assert Mean.of([4.0]) == Mean(4.0, None)
    assert str(Mean.of([4.0])) == "4.00"


def test_overlap_is_intersection_over_union_averaged_over_seeds():
    runs = [Run(0, 9.0, 8.0, 5, 0.7), Run(1, 9.0, 8.0, 5, 0.7)]
    answer = Answer.of("q", variant(), 0.4, runs, runs, [{"2.mlp": 0.5}, {"2.mlp": 1.0}])
    assert answer.overlap == {"2.mlp": 0.75}


@pytest.mark.slow
def test_ablate_writes_tables_pictures_and_every_measurement(type_in, arguments, tmp_path):
    extra = ["--questions", "[methods,mlp_probe]", "--ratios", "[0.2,0.4]", "--seeds", "[0,5]", "--out", tmp_path]
    assert type_in("ablate", arguments, extra=extra) == 0
    assert {path.name for path in tmp_path.iterdir()} == OUTPUT | {"ablation-methods.png", "ablation-mlp_probe.png"}
    record = json.loads((tmp_path / "ablation.json").read_text())
    answers = {(a["question"], a["variant"], a["ratio"]): a for a in record["answers"]}
    assert len(answers) == 2 * (4 + 2)
    published, best = answers["methods", "PP as published", 0.4], answers["methods", "PP, best (ours)", 0.4]
    assert published["seeds"] == best["seeds"] == [0, 5]
    assert published["difference"] == {"value": 0.0, "error": 0.0}
    assert published["degradation"] == 1.0
    # calibration windows and drawn probes differ from seed to seed; full batches do not
    assert published["perplexities"][0] != published["perplexities"][1]
    full = answers["methods", "Full-Batch Probing", 0.4]
    assert full["perplexities"][0] == full["perplexities"][1]
    assert full["seeds"] == [0, 5]
    # one measurement where two questions share a variant
    assert answers["mlp_probe", "rows x tokens", 0.4]["perplexities"] == best["perplexities"]
    assert best["settings"]["compensation"] == "probe"
    assert best["flops_ratio"] < 1 < full["flops_ratio"] + 0.2
    rows = list(csv.DictReader((tmp_path / "ablation.csv").open()))
    assert len(rows) == 2 * len(answers)
    table = (tmp_path / "ablation.md").read_text()
    assert table.count("PP, best (ours)") == 2
    assert "±" in table and "batch 4 x 32" in table and "float32" in table


def test_ablate_measures_what_compare_does(type_in, arguments, tmp_path):
    extra = ["--questions", "[methods]", "--ratios", "[0.4]", "--seeds", "[0]", "--out", tmp_path / "ablate"]
    assert type_in("ablate", arguments, extra=extra) == 0
    extra = ["--methods", "[pp,full_batch,ppsp,best]", "--ratios", "[0.4]", "--out", tmp_path / "compare"]
    assert type_in("compare", arguments, extra=extra) == 0
    answers = json.loads((tmp_path / "ablate" / "ablation.json").read_text())["answers"]
    rows = json.loads((tmp_path / "compare" / "results.json").read_text())["rows"]
    assert [a["perplexities"][0] for a in answers] == [row["perplexity"] for row in rows[1:]]
    assert [a["flops_ratio"] for a in answers] == [row["flops_ratio"] for row in rows[1:]]


def test_overlap_question_shows_each_layer(type_in, arguments, tmp_path, monkeypatch):
    question = Question("How?", [variant("pp"), Variant("full", lambda seed: FullBatchProbing())], overlap=True)
    monkeypatch.setattr("pp_lightning.app.trainer.QUESTIONS", {"overlap": question})
    monkeypatch.setattr("pp_lightning.app.commands.QUESTIONS", {"overlap": question})
    extra = ["--questions", "[overlap]", "--ratios", "[0.4]", "--seeds", "[0]", "--out", tmp_path]
    assert type_in("ablate", arguments, extra=extra) == 0
    pp, full = json.loads((tmp_path / "ablation.json").read_text())["answers"]
    assert set(pp["overlap"]) == {f"{layer}.{block}" for layer in (2, 3, 4) for block in ("attention", "mlp")}
    assert all(0 < share < 1 for name, share in pp["overlap"].items() if "mlp" in name)
    assert set(full["overlap"].values()) == {1.0}
    assert "Full-Batch Probing" in (tmp_path / "ablation.md").read_text()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--questions", "[methods,speed]"], "there is no question 'speed': choose from methods, probe_size"),
        (["--questions", "[]"], "no questions are asked"),
        (["--seeds", "[1,1]"], "seeds must be different numbers"),
        (["--seeds", "[]"], "seeds must be different numbers"),
        (["--seeds", "[first]"], "seeds"),
        (["--ratios", "[1.5]"], "ratios must be in [0, 1), not 1.5"),
        (["--ratios", "[-0.1]"], "ratios must be in [0, 1), not -0.1"),
        (["--ratios", "[0.0,0.4]"], "at ratio 0.0 nothing is removed"),
        (["--ratios", "[]"], "ratios must be different numbers"),
        (["--ratios", "[0.4,0.4]"], "ratios must be different numbers"),
        (["--ratios", "[0.4]", "--model.floor", "0.9"], "lower floor or pruning_ratio"),
        (["--model.allocation", "global"], "--model.allocation would settle for all variants"),
        (["--model.uniform", "true", "--model.skip_layers", "null"], "--model.uniform would settle"),
        (["--model.frozen_on", "history"], "--model.frozen_on would settle"),
        (["--data.protocol", "paper"], "protocol contiguous"),
        (["--model.statistics", "file"], "leave model.statistics and model.importances out"),
        (["--model.importances", "file"], "leave model.statistics and model.importances out"),
    ],
)
def test_mistakes_are_one_line(type_in, arguments, capsys, tmp_path, extra, message):
    assert type_in("ablate", arguments, extra=[*extra, "--out", tmp_path / "out"]) == 2
    assert message in refused(capsys)
    assert not (tmp_path / "out").exists()


def test_without_anything_lost_there_is_no_share_of_it():
    runs = [Run(0, 8.0, 8.0, 5, 1.0)]
    answer = Answer.of("q", variant(), 0.01, runs, runs, None)
    assert answer.degradation is None
    (grid,) = report.tables({"q": Question("Which?", [variant()])}, [answer])
    assert grid.rows[0][4] == ""


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
def test_an_interrupted_run_goes_on_where_it_stopped(type_in, arguments, tmp_path, monkeypatch):
    question = Question("How?", [variant("pp"), variant("b", row_ratio=0.5)], overlap=True)
    known = {"overlap": question, "methods": QUESTIONS["methods"]}
    monkeypatch.setattr("pp_lightning.app.trainer.QUESTIONS", known)
    monkeypatch.setattr("pp_lightning.app.commands.QUESTIONS", known)
    asked = ["--questions", "[methods,overlap]", "--ratios", "[0.4]", "--seeds", "[0,1]"]

    def answers(folder):
        record = json.loads((folder / "ablation.json").read_text())
        return record["answers"]

    with monkeypatch.context() as patch:
        every = interrupted_after(1000, patch)
        assert type_in("ablate", arguments, extra=[*asked, "--out", tmp_path / "whole"]) == 0
    with monkeypatch.context() as patch:
        first = interrupted_after(9, patch)
        with contextlib.suppress(KeyboardInterrupt):
            assert type_in("ablate", arguments, extra=[*asked, "--out", tmp_path / "cut"]) != 0
    assert [path.name for path in (tmp_path / "cut").iterdir()] == [UNFINISHED]
    other = [*asked, "--model.round_to", 32, "--out", tmp_path / "cut"]
    assert type_in("ablate", arguments, extra=other) == 2  # figures of other settings are not mixed in
    with monkeypatch.context() as patch:
        rest = interrupted_after(1000, patch)
        assert type_in("ablate", arguments, extra=[*asked, "--out", tmp_path / "cut"]) == 0
    assert len(first) == 9
    assert len(rest) < len(every) - 5
    assert "dense" not in rest
    assert answers(tmp_path / "cut") == answers(tmp_path / "whole")
    assert UNFINISHED not in {path.name for path in (tmp_path / "cut").iterdir()}


@pytest.mark.parametrize(("highest", "scale"), [(140.0, "linear"), (5000.0, "log")])
def test_perplexities_are_plain_numbers_on_their_axis(highest, scale):
    figure = Figure()
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([1, 2, 3], [123.0, 125.0, highest])
    perplexity_axis(axes, 123.0, highest)
    figure.draw_without_rendering()
    low, high = axes.get_ylim()
    ticks = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    shown = [label.get_text() for at, label in ticks if low <= at <= high]
    assert axes.get_yscale() == scale
    assert len(shown) >= 3
    assert all(float(text) > 0 for text in shown)


def test_pictures_of_an_earlier_run_do_not_stay_beside_other_figures(type_in, arguments, tmp_path):
    (tmp_path / "ablation-fusion.png").write_text("of another run")
    (tmp_path / "notes.png").write_text("the user's")
    extra = ["--questions", "[mlp_probe]", "--ratios", "[0.4]", "--seeds", "[0]", "--out", tmp_path]
    assert type_in("ablate", arguments, extra=extra) == 0
    assert {path.name for path in tmp_path.iterdir()} == OUTPUT | {"ablation-mlp_probe.png", "notes.png"}


def test_a_bench_puts_back_what_a_variant_overrules():
    class Trainer:
        callbacks: list = []  # noqa: RUF012

        def test(self, model, **_):
            seen.append((model.method is None, model.allocation, model.skip_layers))
            raise InterruptedError

    class Model:
        importances_file = None
        statistics_file, method, pruning_ratio, label = None, "before", 0.1, "dense"
        allocation, skip_layers, refresh = None, (0,), None

    from pp_lightning.data import LanguageModelling

    seen, model = [], Model()
    finished = ResumeFile(None, {}, "form")
    finished.add("dense", {"perplexity": 1.0})
    bench = Bench(Trainer(), model, LanguageModelling(), finished)
    with pytest.raises(InterruptedError):
        bench.run(Variant("v", lambda seed: ProbePruning(), allocation="uniform", skip_layers=()), 0.4, 0, False)
    assert seen == [(False, "uniform", ())]
    assert (model.method, model.pruning_ratio, model.allocation, model.skip_layers) == ("before", 0.1, None, (0,))


def test_tables_name_every_variant():
    question = Question("Which?", [variant("a"), variant("b", row_ratio=0.5)])
    runs = [Run(0, 10.0, 8.0, 5, 0.7)]
    answers = [Answer.of("q", v, 0.4, runs, runs, None) for v in question.variants]
    (grid,) = report.tables({"q": question}, answers)
    assert [row[0] for row in grid.rows] == ["a", "b"]
    assert "8.00" in grid.title
    assert torch.tensor([len(row) == len(grid.headings) for row in grid.rows]).all()
