"""The command line as a user types it: results, reproducibility, and one line for every mistake."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pp_lightning import Statistics, calibration
from pp_lightning.app.descriptions import COMMANDS
from pp_lightning.app.trainer import PruningTrainer
from pp_lightning.benchmark import BenchmarkSettings
from pp_lightning.benchmark.variants import chosen_variants
from pp_lightning.commonsense import TASK_NAMES, evaluate
from pp_lightning.interfaces import model_inputs
from tests.app.conftest import VOCABULARY, save, save_another
from tests.commonsense.samples import write_samples
from tests.models import tiny

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs"
OF_MODELS = {path.stem for path in (CONFIGS / "models").glob("*.yaml")}
OF_METHODS = {path.stem for path in (CONFIGS / "methods").glob("*.yaml")}
# The first lines of every file say how it is used.
USES = [
    pytest.param(line.partition("  (")[0].split()[2:], id=f"{path.parent.name}/{path.stem}-{number}")
    for path in sorted(CONFIGS.rglob("*.yaml"))
    for number, line in enumerate(path.read_text().replace("\\\n#", "").splitlines())
    if line.startswith("#   pp-lightning")
]
FILES = {"results.json", "results.csv", "results.md"}


def refused(capsys):
    """The one line that a mistake leaves on the error stream."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pp-lightning:")]
    assert len(lines) == 1
    return lines[0]


def test_compare_writes_the_table_for_eyes_and_machines(type_in, arguments, tmp_path):
    extra = ["--methods", "[full_batch,pp,ppsp,flap,wanda_sp]", "--ratios", "[0.2,0.4]", "--out", tmp_path]
    assert type_in("compare", arguments, extra=extra) == 0
    assert {path.name for path in tmp_path.iterdir()} == FILES | {"results.png"}
    record = json.loads((tmp_path / "results.json").read_text())
    rows = record["rows"]
    assert [row["method"] for row in rows] == ["dense"] + ["full_batch", "pp", "ppsp", "flap", "wanda_sp"] * 2
    assert [row["pruning_ratio"] for row in rows] == [0.0] + [0.2] * 5 + [0.4] * 5
    dense = rows[0]
    assert (dense["flops_ratio"], dense["degradation"], dense["kept"]) == (1.0, 0.0, {})
    for row in rows[1:]:
        assert row["perplexity"] != dense["perplexity"]
        assert row["tokens"] == dense["tokens"]
        assert row["degradation"] == row["perplexity"] - dense["perplexity"]
        assert row["flops_ratio"] < 1.0
        assert (row["probe_share"] > 0) == (row["method"] in ("full_batch", "pp"))
    for ratio in (rows[1:6], rows[6:]):  # Full-Batch Probing costs more than any other at the same ratio
        assert max(ratio, key=lambda row: row["flops_ratio"])["method"] == "full_batch"
    assert rows[7]["kept"] == {"attention": [3, 3], "mlp": [64, 64]}
    assert record["data"]["batch_size"] == 4
    assert record["data"]["order"]
    assert len(record["data"]["text"]["sha256"]) == 64
    assert record["environment"]["versions"]["torch"] == torch.__version__
    assert record["environment"]["device"] == "cpu"
    assert record["settings"]["model"]["round_to"] == 16
    assert len(list(csv.DictReader((tmp_path / "results.csv").open()))) == 11
    table = (tmp_path / "results.md").read_text()
    assert table.count("Probe Pruning") == 2
    assert "batch 4 x 32" in table and "float32" in table


def test_test_gives_the_figures_of_compare_and_of_plain_transformers(
    type_in, arguments, tmp_path, place, stock_perplexity
):
    extra = ["--methods", "[pp]", "--ratios", "[0.4]", "--out", tmp_path / "compare"]
    assert type_in("compare", arguments, extra=extra) == 0
    extra = ["--model.method", "ProbePruning", "--model.pruning_ratio", 0.4, "--out", tmp_path / "test"]
    assert type_in("test", arguments, extra=extra) == 0
    assert type_in("test", arguments, extra=["--out", tmp_path / "dense"]) == 0
    rows = json.loads((tmp_path / "compare" / "results.json").read_text())["rows"]
    alone = json.loads((tmp_path / "test" / "results.json").read_text())["rows"]
    assert alone[0]["perplexity"] == rows[1]["perplexity"]
    assert alone[0]["kept"] == rows[1]["kept"]
    assert (
        json.loads((tmp_path / "dense" / "results.json").read_text())["rows"][0]["perplexity"] == rows[0]["perplexity"]
    )
    assert rows[0]["perplexity"] == pytest.approx(stock_perplexity(place / "model"), rel=1e-5)


def test_variants_are_rows_with_settings_of_their_own(type_in, arguments, tmp_path):
    config = tmp_path / "variants.yaml"
    method = {"class_path": "pp_lightning.methods.ProbePruning", "init_args": {"blocks": ["mlp"], "row_ratio": 0.5}}
    config.write_text(yaml.safe_dump({"methods": [], "ratios": [0.4], "variants": {"channels only": method}}))
    assert type_in("compare", {"--config": config, **arguments}, extra=["--out", tmp_path / "out"]) == 0
    row = json.loads((tmp_path / "out" / "results.json").read_text())["rows"][1]
    assert row["method"] == "channels only"
    assert row["settings"]["row_ratio"] == 0.5
    assert row["kept"] == {"attention": [8, 8], "mlp": [64, 64]}


def test_paper_protocol(type_in, arguments, tmp_path):
    extra = ["--data.protocol", "paper", "--out", tmp_path]
    assert type_in("test", arguments, extra=extra) == 0
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["data"]["order"] == "random starts"
    assert record["rows"][0]["tokens"] % (4 * 31) == 0


def test_statistics_file_is_written_and_read(type_in, arguments, tmp_path):
    file = tmp_path / "statistics.safetensors"
    extra = ["--model.method", "WandaSP", "--model.statistics", file]
    assert type_in("test", arguments, extra=[*extra, "--out", tmp_path / "first"]) == 0
    written = file.read_bytes()
    extra = ["--model.method", "FLAP", "--model.statistics", file]
    assert type_in("test", arguments, extra=[*extra, "--out", tmp_path / "second"]) == 0
    assert file.read_bytes() == written


def test_fit_writes_a_checkpoint_that_test_reads(type_in, arguments, place, tmp_path):
    sources = [{"class_path": "pp_lightning.data.TextFile", "init_args": {"path": str(place / "text.txt")}}]
    config = tmp_path / "fit.yaml"
    trainer = {"max_steps": 4, "max_epochs": -1, "enable_progress_bar": False, "accelerator": "cpu"}
    config.write_text(yaml.safe_dump({"data": {"train": sources}, "trainer": trainer}))
    extra = ["--model.learning_rate", 0.01, "--model.warmup_steps", 1, "--out", tmp_path / "trained"]
    assert type_in("fit", {"--config": config, **arguments}, extra=extra) == 0
    before = type_in("test", arguments, extra=["--out", tmp_path / "before"])
    after = type_in("test", {**arguments, "--model.path": tmp_path / "trained"}, extra=["--out", tmp_path / "after"])
    assert (before, after) == (0, 0)
    figures = [json.loads((tmp_path / n / "results.json").read_text())["rows"][0] for n in ("before", "after")]
    assert figures[1]["perplexity"] < 0.9 * figures[0]["perplexity"]


@pytest.mark.slow
def test_the_fit_config_runs_where_an_epoch_is_short(type_in, tmp_path):
    """How long the text is depends on the Python version: it validates by steps, not by steps of an epoch."""
    options = {"--config": REPOSITORY / "configs/fit.yaml", "--trainer.max_steps": 1}
    options |= {"--trainer.limit_val_batches": 1, "--trainer.precision": "32-true", "--trainer.limit_train_batches": 9}
    options["--data.batch_size"] = 1
    assert type_in("fit", options, extra=["--out", tmp_path]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.num_hidden_layers > 1


@pytest.fixture
def settings_of(type_in, monkeypatch, capsys):
    """All settings of a command, as it would run."""

    def run(command, *words):
        monkeypatch.chdir(REPOSITORY)
        assert type_in(command, {}, extra=[*words, "--print_config"]) == 0
        return yaml.safe_load(capsys.readouterr().out)

    return run


@pytest.mark.parametrize("words", USES)
def test_the_commands_that_configs_name_parse(words, settings_of):
    resolved = settings_of(*words)
    first = yaml.safe_load((REPOSITORY / re.search(r"configs/\S+", " ".join(words))[0]).read_text())
    if words[0] != "benchmark":
        assert resolved["data"]["init_args"]["window"] == first["data"]["window"]
        assert resolved["model"]["path"] == first["model"].get("path")


def test_a_method_is_pruned_with_what_its_model_says(settings_of):
    words = ["test", "--config", "configs/models/llama-3-8b.yaml", "--config", "configs/methods/probe_pruning.yaml"]
    resolved = settings_of(*words, "--model.method.blocks", "[mlp]")
    model, data = resolved["model"], resolved["data"]["init_args"]
    assert model["path"] == "meta-llama/Meta-Llama-3-8B" and model["pruning_ratio"] == 0.4
    assert model["statistics"] == "statistics/llama-3-8b.safetensors"
    assert model["method"]["init_args"]["row_ratio"] == 0.05 and model["method"]["init_args"]["blocks"] == ["mlp"]
    assert (data["window"], data["batch_size"], data["calibration_samples"]) == (1024, 20, 2000)
    words[-1] = "configs/methods/llm_pruner.yaml"
    model = settings_of(*words)["model"]
    assert (model["round_to"], model["statistics"], model["dtype"]) == (1, None, "bfloat16")


@pytest.mark.parametrize(
    ("name", "cases"),
    [
        ("cpu", [(20, 128), (4, 64), (1, 32)]),
        ("cpu_decoding", [(1, 32)]),
        ("gpu", [(20, 1024), (1, 128)]),
        ("gpu_graphs", [(20, 1024), (1, 128), (8, 128)]),
    ],
)
def test_benchmark_configs_are_read(name, cases, settings_of):
    path = CONFIGS / "benchmark" / f"{name}.yaml"
    resolved = settings_of("benchmark", "--config", path)
    settings = BenchmarkSettings.from_plain(yaml.safe_load(path.read_text()))
    settings.check()
    chosen_variants(settings.variants)
    assert [(case.rows, case.tokens) for case in settings.cases] == cases
    assert resolved["repeats"] == settings.repeats


@pytest.mark.parametrize(
    ("words", "named"), [(["--batches", "3"], "batches"), (["--nope", "1"], "nope"), (["--variants", "[x]"], "x")]
)
def test_mistakes_in_a_benchmark_are_one_line(words, named, type_in, capsys):
    assert type_in("benchmark", {}, extra=words) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1


@pytest.mark.slow
def test_compiled_rows_say_what_compiling_took(only_traced, type_in, arguments, tmp_path):
    """The same figures as eager ones, and the number of graphs in the table."""
    extra = ["--methods", "[pp]", "--ratios", "[0.4]"]
    assert type_in("compare", arguments, extra=[*extra, "--out", tmp_path / "eager"]) == 0
    compiled = [*extra, "--model.compile", "true", "--out", tmp_path / "compiled"]
    assert type_in("compare", arguments, extra=compiled) == 0
    rows = [json.loads((tmp_path / name / "results.json").read_text())["rows"] for name in ("eager", "compiled")]
    for one, other in zip(*rows, strict=True):
        assert other["perplexity"] == pytest.approx(one["perplexity"], rel=1e-5)
        assert other["compiled"]["graphs"] >= 1 and "compiled" not in one
    assert "graphs" in (tmp_path / "compiled" / "results.md").read_text()


def test_all_published_models_and_methods_have_a_file_that_says_how_it_is_used():
    for path in CONFIGS.rglob("*.yaml"):
        assert path.relative_to(REPOSITORY).as_posix() in path.read_text()
    assert {"llama-2-7b", "llama-2-13b", "llama-3-8b", "opt-13b", "tiny"} == OF_MODELS
    assert {"llm_pruner", "llm_pruner_lora", "lora_prune", "lora_prune_lora", "parallel_probing"} <= OF_METHODS
    assert {"full_batch_probing", "probe_pruning", "static_ppsp", "flap", "wanda_sp", "compare"} <= OF_METHODS


def commonsense_arguments(place, folder):
    """Arguments of a commonsense run on rows made up for the tests."""
    return {
        "--model.path": place / "model",
        "--model.skip_layers": "[0,1]",
        "--model.round_to": 16,
        "--data": "commonsense",
        "--data.path": write_samples(folder),
        "--data.window": 64,
        "--data.batch_size": 8,
        "--data.calibration_samples": 4,
        "--data.calibration": "C4",
        "--data.calibration.path": place / "documents.jsonl",
        "--trainer.accelerator": "cpu",
    }


def test_commonsense_tables(type_in, place, tmp_path):
    given = commonsense_arguments(place, tmp_path / "rows")
    extra = ["--methods", "[pp,wanda_sp]", "--ratios", "[0.4]", "--out", tmp_path / "out"]
    assert type_in("compare", given, extra=extra) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES | {"results.png"}
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["method"] for row in record["rows"]] == ["dense", "pp", "wanda_sp"]
    for row in record["rows"]:
        assert list(row["tasks"]["tasks"]) == list(TASK_NAMES)
        accuracies = [task["acc"] for task in row["tasks"]["tasks"].values()]
        assert row["tasks"]["mean"]["acc"] == pytest.approx(sum(accuracies) / 7)
        assert (row["flops_ratio"] < 1) == (row["method"] != "dense")
    assert record["data"]["batch_size"] == 8 and record["data"]["order"]
    lines = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert [line["task"] for line in lines] == [*TASK_NAMES, "mean"] * 3
    table = (tmp_path / "out" / "results.md").read_text()
    assert all(f"| {task} |" in table for task in (*TASK_NAMES, "mean"))
    assert "accuracy, per character" in table


def test_commonsense_chosen_on_contexts(type_in, place, tmp_path, capsys):
    given = commonsense_arguments(place, tmp_path / "rows") | {"--data.choose_on": "context", "--data.tasks": "[piqa]"}
    options = {"--methods": "[pp]", "--ratios": "[0.4]", "--out": tmp_path / "out"}
    assert type_in("compare", given | options) == 0
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["data"]["choose_on"] == "context" and record["data"]["order"] == "longest context first"
    dense, row = record["rows"]
    assert dense["flops_ratio"] == 1 and row["flops_ratio_after_prompt"] < row["flops_ratio"] < 1
    assert "chosen on contexts alone" in (tmp_path / "out" / "results.md").read_text()
    capsys.readouterr()
    for change, message in (
        ({"--data.choose_on": "prompt"}, "choose_on"),
        ({"--model.refresh": 8}, "refresh would choose by the tokens of answers"),
    ):
        assert type_in("compare", given | options | change | {"--out": tmp_path / "none"}) == 2
        assert message in refused(capsys)
        assert not (tmp_path / "none").exists()


def test_interrupted_commonsense_run_resumes_at_its_task(type_in, place, tmp_path, monkeypatch):
    given = commonsense_arguments(place, tmp_path / "rows") | {
        "--model.method": "ProbePruning",
        "--out": tmp_path / "out",
    }
    scored = []

    def interrupted(model, batch, *, real=evaluate.score_batch, **given):
        scored.append(batch)
        if len(scored) == 4:
            raise KeyboardInterrupt
        return real(model, batch, **given)

    monkeypatch.setattr(evaluate, "score_batch", interrupted)
    try:
        code = type_in("test", given)
    except KeyboardInterrupt:
        code = 1
    assert code != 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["unfinished-pp-0.2.json"]
    first = len(scored)
    assert type_in("test", given) == 0
    resumed = json.loads((tmp_path / "out" / "results.json").read_text())["rows"][0]
    again = len(scored) - first
    given["--out"] = tmp_path / "whole"
    assert type_in("test", given) == 0
    assert len(scored) - first - again > again  # the resumed run scored less than a whole one
    whole = json.loads((tmp_path / "whole" / "results.json").read_text())["rows"][0]
    for row in (resumed, whole):
        for task in row["tasks"]["tasks"].values():
            task.pop("seconds")
    assert resumed == whole
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


def test_bad_commonsense_row_is_named(type_in, place, tmp_path, capsys):
    given = commonsense_arguments(place, tmp_path / "rows") | {"--out": tmp_path / "out"}
    file = tmp_path / "rows" / "arc_easy" / "test.jsonl"
    file.write_text(file.read_text().replace('"answerKey"', '"key"', 1))
    assert type_in("test", given) == 2
    assert re.search(r"arc_easy/test\.jsonl.*line 1", refused(capsys))
    assert not (tmp_path / "out").exists()


def test_lm_eval_command(type_in, capsys):
    pytest.importorskip("lm_eval")
    assert type_in("lm-eval", {}, extra=["--help"]) == 0
    assert "--model_args" in capsys.readouterr().out


MISTAKES = {
    "missing checkpoint": ({"--model.path": "/nowhere/at/all"}, "no checkpoint folder"),
    "folder without config": ({"--model.path": str(REPOSITORY / "tests")}, r"has no config.json"),
    "missing text": ({"--data.text.path": "/nowhere.txt"}, "no text file at /nowhere.txt"),
    "ratio of one": ({"--model.pruning_ratio": 1.0}, r"must be in \[0, 1\)"),
    "negative ratio": ({"--model.pruning_ratio": -0.1}, r"must be in \[0, 1\)"),
    "no head left": ({"--model.pruning_ratio": 0.9}, "leaves no head"),
    "no layer left": ({"--model.skip_layers": "[0,1,2,3,4]"}, "leaves none of the 5 layers"),
    "layer that is not there": ({"--model.skip_layers": "[7]"}, "names layer 7"),
    "window too long": ({"--data.window": 4096}, "exceed the model's 128 positions"),
    "unknown key": ({"--model.colour": "red"}, "model.colour"),
    "unknown method": (
        {"--model.method": "Magic"},
        "^pp-lightning: there is no method 'Magic': choose from full_batch, pp, after_ocp, griffin, ",
    ),
    "misspelled method class": (
        {"--model.method": "ProbePrunning"},
        r"^pp-lightning: there is no method 'ProbePrunning': did you mean ProbePruning( or \w+)?\?$",
    ),
    "misspelled source": (
        {"--data.calibration": "C5"},
        r"^pp-lightning: there is no text 'C5': choose from C4, Embedded, HubText, Records, TextFile, WikiText2$",
    ),
    "unknown setting of a method": ({"--model.method.colour": "red"}, "colour"),
    "unknown protocol": ({"--data.protocol": "mine"}, "protocol"),
    "text for a number": (
        {"--data.window": "long"},
        "^pp-lightning: --data.window: expected a whole number, not 'long'$",
    ),
    "no window": ({"--data.window": 0}, "window"),
    "a probe of more than all": ({"--model.method": "ProbePruning", "--model.method.token_ratio": 1.5}, "token_ratio"),
    "fewer tokens than none": ({"--data.limit_tokens": -5}, "at least 2"),
    "no such accelerator": ({"--trainer.accelerator": "hpu"}, "the trainer's options"),
    "no such strategy": ({"--trainer.strategy": "nonsense"}, "strategy"),
    "a share above all": ({"--trainer.limit_test_batches": 2.5}, "limit_test_batches"),
    "no document long enough": (
        {"--data.calibration_samples": 4, "--data.window": 128, "--data.calibration": "short"},
        "none of the",
    ),
}


@pytest.mark.parametrize("command", ["test", "compare"])
@pytest.mark.parametrize("where", ["file", "file/below", "locked/new"])
def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    command, where, type_in, arguments, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("pp_lightning.app.module.open_model", lambda *_, **__: pytest.fail("work was begun"))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "locked").mkdir()
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path) and allowed(path, mode))
    assert type_in(command, arguments, extra=["--out", tmp_path / where]) == 2
    assert "another place with --out" in refused(capsys)
    assert (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "locked" / "new").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [(["--ratios", "[0]"], "ratio 0.0"), (["--methods", "[]"], "nothing"), (["--ratios", "[]"], "nothing")],
)
def test_a_comparison_needs_something_to_compare(options, named, type_in, arguments, tmp_path, capsys):
    assert type_in("compare", arguments, extra=[*options, "--out", tmp_path]) == 2
    assert named in refused(capsys)


def test_errors_of_ours_stay_loud(type_in, arguments, tmp_path, monkeypatch):
    def broken(*_, **named):
        raise ValueError("ours")

    monkeypatch.setattr(PruningTrainer, "compare", broken)
    with pytest.raises(ValueError, match="ours"):
        type_in("compare", arguments, extra=["--out", tmp_path])


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(mistake, type_in, arguments, tmp_path, capsys):
    changes, message = MISTAKES[mistake]
    given = {**arguments, "--model.method": "ProbePruning", "--out": tmp_path / "out", **changes}
    if given["--data.calibration"] == "short":
        (tmp_path / "short.jsonl").write_text('{"text": "too short"}\n')
        given |= {"--data.calibration": "C4", "--data.calibration.path": tmp_path / "short.jsonl"}
    assert type_in("test", given) == 2
    assert re.search(message, refused(capsys))
    assert not (tmp_path / "out").exists()


def test_empty_text(type_in, arguments, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    given = {**arguments, "--data.text.path": tmp_path / "empty.txt", "--out": tmp_path / "out"}
    assert type_in("test", given) == 2
    assert "use a longer text" in refused(capsys)
    assert not (tmp_path / "out").exists()


def test_unknown_method_in_compare(type_in, arguments, tmp_path, capsys):
    assert type_in("compare", arguments, extra=["--methods", "[pp,magic]", "--out", tmp_path / "out"]) == 2
    assert (
        "there is no method 'magic': choose from full_batch, pp, after_ocp, griffin, static_best, ppsp, flap, wanda_sp"
        in refused(capsys)
    )
    assert not (tmp_path / "out").exists()


def test_sigterm_ends_a_calibration_that_can_go_on(type_in, arguments, tmp_path, monkeypatch):
    given = {**arguments, "--model.method": "WandaSP", "--data.batch_size": 1}
    assert type_in("test", given, extra=["--model.statistics", tmp_path / "whole", "--out", tmp_path / "one"]) == 0
    extra, saw = ["--model.statistics", tmp_path / "halves", "--out", tmp_path / "two"], []

    def told_to_end(model, batch):
        saw.append(batch)
        if len(saw) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return model_inputs(model, batch)

    monkeypatch.setattr(calibration, "model_inputs", told_to_end)
    type_in("test", given, extra=extra)
    assert len(saw) == 3
    assert not list((tmp_path / "two").glob("results*"))
    assert Statistics.load(tmp_path / "halves").num_batches == 3
    assert type_in("test", given, extra=extra) == 0
    assert len(saw) == 8, "it went on where it was"
    assert load_file(tmp_path / "halves").keys() == load_file(tmp_path / "whole").keys()
    for name, tensor in load_file(tmp_path / "whole").items():
        assert torch.equal(load_file(tmp_path / "halves")[name], tensor)


def test_statistics_of_another_model(type_in, arguments, tmp_path, capsys):
    file = tmp_path / "statistics.safetensors"
    given = {**arguments, "--model.method": "WandaSP", "--model.statistics": file}
    assert type_in("test", given, extra=["--out", tmp_path / "mine"]) == 0
    given |= {"--model.path": save_another(tmp_path / "other"), "--out": tmp_path / "out"}
    assert type_in("test", given) == 2
    assert "another model" in refused(capsys)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite(type_in, arguments, tmp_path, capsys):
    broken = tiny("llama", vocab_size=VOCABULARY)
    broken.lm_head.weight.data[5, 5] = float("nan")
    given = {**arguments, "--model.path": save(broken, tmp_path / "broken"), "--out": tmp_path / "out"}
    assert type_in("test", given) == 2
    assert "logits are not finite" in refused(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_evaluate_every_batch_once(arguments, type_in, tmp_path):
    """And keep the same units, by importances that each collects."""
    one, two = tmp_path / "one", tmp_path / "two"
    arguments |= {"--model.method": "LLMPruner", "--model.pruning_ratio": 0.4}
    assert type_in("test", arguments, extra=["--out", one]) == 0
    words = [str(word) for pair in arguments.items() for word in pair]
    command = [sys.executable, "-m", "cli", "test", *words, "--out", str(two)]
    command += ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, timeout=240)
    alone, together = (json.loads((folder / "results.json").read_text()) for folder in (one, two))
    assert together["environment"]["processes"] == 2
    assert together["rows"][0]["tokens"] == alone["rows"][0]["tokens"]
    assert together["rows"][0]["perplexity"] == pytest.approx(alone["rows"][0]["perplexity"], rel=1e-9)


def test_help_teaches(type_in, capsys):
    assert type_in("--help", {}) == 0
    text = capsys.readouterr().out
    assert "examples:" in text and "pp-lightning compare --config configs/models/tiny.yaml" in text
    for command, description in COMMANDS.items():
        assert f" {command} {description}" in " ".join(text.split())


@pytest.mark.parametrize("extra", [[], ["--study", "allocation"]], ids=["methods", "study"])
def test_a_missing_calibration_text_is_found_before_any_evaluation(
    extra, type_in, arguments, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(PruningTrainer, "test", lambda *_, **__: pytest.fail("work was begun"))
    given = {**arguments, "--data.calibration.path": "/nowhere.jsonl", "--out": tmp_path / "out"}
    assert type_in("compare", given, extra=extra) == 2
    assert "no file of records (.jsonl, .jsonl.gz, .parquet, .arrow) at /nowhere.jsonl: give the path" in refused(
        capsys
    )
    assert not (tmp_path / "out").exists()


def test_a_comparison_that_reads_no_calibration_text_needs_none(type_in, arguments, tmp_path):
    given = {**arguments, "--data.calibration.path": "/nowhere.jsonl", "--out": tmp_path}
    assert type_in("compare", given, extra=["--methods", "[full_batch]", "--ratios", "[0.4]"]) == 0


def test_version(type_in, capsys):
    assert type_in("--version", {}) == 0
    assert capsys.readouterr().out == f"pp-lightning {version('pp-lightning')}\n"
