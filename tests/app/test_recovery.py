"""Fine-tuned baselines as a user runs them: fit, test and compare, interruptions and mistakes."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pp_lightning import kept_units, prune_
from pp_lightning.app.module import PrunedLM
from pp_lightning.importances import Importances
from pp_lightning.recovery import Recovered
from tests.app.conftest import VOCABULARY, save_another, write_place
from tests.app.test_cli import REPOSITORY, refused
from tests.commonsense.samples import write_samples
from tests.models import ids, logits, tiny

FOLDER = {"adapter_config.json", "adapter_model.safetensors", "choices.safetensors", "training.csv", "training.png"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """With enough documents to train on."""
    return write_place(tmp_path_factory.mktemp("place"), documents=9)


@pytest.fixture
def settings(place):
    """A config to change and ``run``."""
    documents = {"class_path": "pp_lightning.data.C4", "init_args": {"path": str(place / "documents.jsonl")}}
    return {
        "model": {
            "path": str(place / "model"),
            "skip_layers": [0, 1],
            "round_to": 16,
            "pruning_ratio": 0.4,
            "recovery": {"learning_rate": 0.01, "warmup_steps": 2, "save_every": 3},
        },
        "data": {
            "window": 32,
            "batch_size": 4,
            "calibration_samples": 8,
            "text": {"class_path": "pp_lightning.data.TextFile", "init_args": {"path": str(place / "text.txt")}},
            "calibration": documents,
            "train": {"class_path": "pp_lightning.data.Packed", "init_args": {"sources": [documents], "batch_size": 4}},
        },
        "trainer": {
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "max_steps": 10,
            "gradient_clip_val": 1.0,
            "limit_val_batches": 0,
        },
    }


METHODS = {
    "llm_pruner": {"class_path": "pp_lightning.methods.LLMPruner"},
    "lora_prune": {"class_path": "pp_lightning.methods.LoRAPrune", "init_args": {"every": 2, "cooldown": 0.2}},
}


@pytest.fixture
def run(type_in, tmp_path):
    """Run the program with a config in this process; returns its exit code."""

    def program(command, given, out):
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump(given))
        return type_in(command, {"--config": config, "--out": tmp_path / out})

    return program


def fitted(settings, method):
    settings["model"]["method"] = METHODS[method]
    return settings


def evaluated(settings, **model):
    """The settings of a ``test`` without training."""
    kept = {k: v for k, v in settings["model"].items() if k in ("path", "skip_layers", "round_to")}
    return {"model": kept | model, "data": {k: v for k, v in settings["data"].items() if k != "train"}}


def losses(folder):
    return [float(row["loss"]) for row in csv.DictReader((folder / "training.csv").open())]


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def row(folder, number=0):
    return json.loads((folder / "results.json").read_text())["rows"][number]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_fit_writes_a_small_folder_that_test_evaluates(run, settings, tmp_path, method):
    assert run("fit", fitted(settings, method), "trained") == 0
    assert {path.name for path in (tmp_path / "trained").iterdir()} == FOLDER
    curve = losses(tmp_path / "trained")
    assert len(curve) == 10 and curve[-1] < curve[0] - 0.1
    assert run("test", evaluated(settings, recovered=str(tmp_path / "trained")), "recovered") == 0
    plain = evaluated(settings, method=METHODS[method], pruning_ratio=0.4)
    assert run("test", plain, "pruned") == 0
    recovered, pruned = row(tmp_path / "recovered"), row(tmp_path / "pruned")
    assert recovered["method"] == f"{method}_lora"
    assert recovered["pruning_ratio"] == 0.4
    assert recovered["kept"] == pruned["kept"] == {"attention": [3, 3], "mlp": [64, 64]}
    assert recovered["flops_ratio"] == pruned["flops_ratio"]
    assert recovered["settings"]["recovery"]["steps"] == 10
    assert recovered["perplexity"] < pruned["perplexity"]


def test_what_gradients_choose_is_updated_too(run, settings, tmp_path):
    """With importances from a file, and with new ones."""
    asked = {"method": METHODS["llm_pruner"], "pruning_ratio": 0.4, "importances": str(tmp_path / "it.safetensors")}
    assert run("test", evaluated(settings, **asked), "plain") == 0
    updated = {**asked, "update": "least_squares"}
    assert run("test", evaluated(settings, **updated), "read") == 0
    assert run("test", evaluated(settings, **{**updated, "importances": None}), "new") == 0
    plain, read, new = (row(tmp_path / name) for name in ("plain", "read", "new"))
    assert read["kept"] == new["kept"] == plain["kept"]
    assert read["perplexity"] == pytest.approx(new["perplexity"], rel=1e-6)
    assert read["perplexity"] != pytest.approx(plain["perplexity"], rel=1e-3)


@pytest.mark.slow
def test_llm_pruner_keeps_the_same_units_with_and_without_recovery(run, settings, tmp_path):
    """And recovery with a learning rate of zero is no recovery: the same perplexity."""
    settings["model"]["recovery"]["learning_rate"] = 0.0
    assert run("fit", fitted(settings, "llm_pruner"), "trained") == 0
    assert run("test", evaluated(settings, recovered=str(tmp_path / "trained")), "recovered") == 0
    assert run("test", evaluated(settings, method=METHODS["llm_pruner"], pruning_ratio=0.4), "pruned") == 0
    perplexity = row(tmp_path / "pruned")["perplexity"]
    assert row(tmp_path / "recovered")["perplexity"] == pytest.approx(perplexity, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "accumulate"), [("llm_pruner", 1), ("lora_prune", 2)])
def test_an_interrupted_fit_goes_on_as_if_nothing_had_happened(
    run, settings, tmp_path, monkeypatch, method, accumulate
):
    settings["trainer"]["accumulate_grad_batches"] = accumulate
    assert run("fit", fitted(settings, method), "whole") == 0
    real = PrunedLM.training_step

    def until_the_power_goes(module, batch, index):
        if module.trainer.global_step == 7:
            raise RuntimeError("power cut")
        return real(module, batch, index)

    monkeypatch.setattr(PrunedLM, "training_step", until_the_power_goes)
    with pytest.raises(RuntimeError, match="power cut"):
        run("fit", settings, "halves")
    monkeypatch.setattr(PrunedLM, "training_step", real)
    assert {path.name for path in (tmp_path / "halves").iterdir()} == {"unfinished.ckpt"}
    saved = torch.load(tmp_path / "halves" / "unfinished.ckpt", weights_only=True)
    assert (saved["global_step"], saved["state_dict"]) == (6, {})
    assert run("fit", settings, "halves") == 0
    assert {path.name for path in (tmp_path / "halves").iterdir()} == FOLDER
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    whole, halves = adapter(tmp_path / "whole"), adapter(tmp_path / "halves")
    assert all(torch.equal(halves[name], tensor) for name, tensor in whole.items())
    settings["data"]["seed"] = 1
    assert run("fit", settings, "other") == 0
    assert losses(tmp_path / "other") != losses(tmp_path / "whole")


def test_a_checkpoint_of_another_model_is_refused(run, settings, tmp_path, monkeypatch, capsys):
    real = PrunedLM.training_step
    monkeypatch.setattr(
        PrunedLM,
        "training_step",
        lambda module, batch, i: 1 / (module.trainer.global_step < 4) * real(module, batch, i),
    )
    with pytest.raises(ZeroDivisionError):
        run("fit", fitted(settings, "llm_pruner"), "out")
    monkeypatch.setattr(PrunedLM, "training_step", real)
    before = (tmp_path / "out" / "unfinished.ckpt").read_bytes()
    settings["model"]["pruning_ratio"] = 0.2
    assert run("fit", settings, "out") == 2
    assert "has other settings: remove it or name another folder" in refused(capsys)
    assert (tmp_path / "out" / "unfinished.ckpt").read_bytes() == before


def test_gradients_that_are_not_finite_skip_the_step_visibly(run, settings, tmp_path, monkeypatch, capsys):
    def spoil(module):
        if module.trainer.global_step == 4:
            module.run().adapters.parameters()[3].grad[0, 0] = float("inf")

    monkeypatch.setattr(PrunedLM, "on_after_backward", spoil)
    assert run("fit", fitted(settings, "lora_prune"), "out") == 0
    assert "step 5 skipped: its gradients are not finite (1 skipped so far)" in capsys.readouterr().out
    about = Recovered.load(tmp_path / "out").choices.about
    assert about["skipped_steps"] == 1
    assert all(tensor.isfinite().all() for tensor in adapter(tmp_path / "out").values())


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(run, settings, tmp_path, monkeypatch, capsys):
    real = PrunedLM.training_step

    def diverge(module, batch, index):
        return real(module, batch, index) * (float("nan") if module.trainer.global_step == 7 else 1.0)

    monkeypatch.setattr(PrunedLM, "training_step", diverge)
    assert run("fit", fitted(settings, "llm_pruner"), "out") == 2
    message = refused(capsys)
    assert "the loss is not finite at step 8" in message
    assert "unfinished.ckpt in --out has the last good state" in message
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"unfinished.ckpt"}
    monkeypatch.setattr(PrunedLM, "training_step", real)
    assert run("fit", settings, "out") == 0
    assert len(losses(tmp_path / "out")) == 10


@pytest.mark.slow
def test_accumulation_is_a_larger_batch(run, settings, tmp_path):
    settings["model"]["recovery"]["dropout"] = 0.0
    assert run("fit", fitted(settings, "llm_pruner"), "one") == 0
    settings["trainer"]["accumulate_grad_batches"] = 2
    settings["data"]["train"]["init_args"]["batch_size"] = 2
    assert run("fit", settings, "two") == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(run, settings, tmp_path):
    assert run("fit", fitted(settings, "lora_prune"), "kept") == 0
    settings["model"]["recovery"]["gradient_checkpointing"] = True
    assert run("fit", settings, "recomputed") == 0
    assert losses(tmp_path / "recomputed") == pytest.approx(losses(tmp_path / "kept"), rel=1e-5)


@pytest.mark.slow
def test_mixed_precision(run, settings, tmp_path):
    assert run("fit", fitted(settings, "lora_prune"), "full") == 0
    settings["trainer"]["precision"] = "bf16-mixed"
    assert run("fit", settings, "mixed") == 0
    full, mixed = losses(tmp_path / "full"), losses(tmp_path / "mixed")
    assert full != mixed
    assert mixed == pytest.approx(full, rel=0.05)
    assert {tensor.dtype for tensor in adapter(tmp_path / "mixed").values()} == {torch.float32}


def comparison(settings, methods):
    lora = {"class_path": "pp_lightning.methods.LoRAPrune", "init_args": {"every": 2, "cooldown": 0.2}}
    settings["model"].pop("pruning_ratio", None)  # a comparison has ratios
    return {**settings, "methods": methods, "ratios": [0.4], "variants": {"another": lora}}


@pytest.mark.slow
def test_compare_lists_them_beside_the_others(run, settings, tmp_path, monkeypatch):
    del settings["model"]["pruning_ratio"]
    methods = ["pp", "llm_pruner", "llm_pruner_lora", "wanda_sp_lora", "lora_prune", "wanda_sp"]
    given = comparison(settings, methods)
    assert run("compare", given, "out") == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [r["method"] for r in rows] == ["dense", *methods, "another"]
    by = {r["method"]: r for r in rows}
    assert by["llm_pruner_lora"]["perplexity"] < by["llm_pruner"]["perplexity"]
    assert by["wanda_sp_lora"]["perplexity"] < by["wanda_sp"]["perplexity"]
    assert by["another"]["perplexity"] == by["lora_prune"]["perplexity"]
    assert {r["flops_ratio"] for r in rows[2:]} == {by["wanda_sp"]["flops_ratio"]}
    assert "LLM-Pruner, LoRA" in (tmp_path / "out" / "results.md").read_text()
    assert {path.name for path in (tmp_path / "out" / "recovered").iterdir()} == {
        "llm_pruner_lora-0.4",
        "wanda_sp_lora-0.4",
    }

    assert run("compare", {**given, "methods": ["pp", "wanda_sp"]}, "plain") == 0  # training left the model as it was
    for number, name in enumerate(("dense", "pp", "wanda_sp")):
        assert row(tmp_path / "plain", number)["perplexity"] == by[name]["perplexity"]

    monkeypatch.setattr(PrunedLM, "training_step", None)  # what is trained is not trained again
    assert run("compare", {**given, "methods": ["llm_pruner_lora"]}, "out") == 0
    assert row(tmp_path / "out", 1)["perplexity"] == by["llm_pruner_lora"]["perplexity"]


@pytest.mark.slow
def test_compare_trains_lora_prune_on_the_calibration_text(run, settings, tmp_path):
    del settings["data"]["train"]
    settings["trainer"]["max_steps"] = 20  # the default schedule removes units every ten steps
    assert run("compare", comparison(settings, ["lora_prune", "lora_prune_lora"]), "out") == 0
    assert row(tmp_path / "out", 2)["method"] == "lora_prune_lora"
    assert row(tmp_path / "out", 2)["kept"] == row(tmp_path / "out", 1)["kept"]
    assert len(losses(tmp_path / "out" / "recovered" / "lora_prune_lora-0.4")) == 20


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_importances_are_kept_in_a_file(run, settings, tmp_path, monkeypatch, method):
    """Written once, for all layers; then read, at any ratio, and nothing is collected."""
    file = tmp_path / "kept" / "importances.safetensors"
    given = evaluated(settings, method=METHODS[method], pruning_ratio=0.4)
    assert run("test", given, "without") == 0
    given["model"]["importances"] = str(file)
    assert run("test", given, "written") == 0
    written = file.read_bytes()
    assert {layer for layer, _ in Importances.load(file).members} == {0, 1, 2, 3, 4}  # the skipped ones too
    for name in ("taylor_importances", "lora_importances"):
        monkeypatch.setattr(f"pp_lightning.app.prunable.{name}", None)
    assert run("test", given, "read") == 0
    perplexities = [row(tmp_path / out)["perplexity"] for out in ("without", "written", "read")]
    assert perplexities[0] == perplexities[1] == perplexities[2]
    del given["model"]["pruning_ratio"], given["model"]["method"]
    assert run("compare", {**given, "methods": [method], "ratios": [0.2, 0.4]}, "compared") == 0
    assert row(tmp_path / "compared", 2)["perplexity"] == perplexities[0]
    assert row(tmp_path / "compared", 1)["perplexity"] != perplexities[0]
    assert file.read_bytes() == written


def without_method(settings):
    """For ``compare``, which names its methods itself."""
    return settings | {"model": {name: value for name, value in settings["model"].items() if name != "method"}}


@pytest.mark.slow
def test_importances_that_do_not_fit(run, settings, tmp_path, capsys):
    file = tmp_path / "importances.safetensors"
    given = evaluated(settings, method=METHODS["llm_pruner"], importances=str(file))
    assert run("compare", without_method(given) | {"methods": ["llm_pruner", "lora_prune"]}, "out") == 2
    assert "llm_pruner and lora_prune choose from importances of different kinds" in refused(capsys)
    assert run("test", given, "first") == 0
    given["model"]["method"] = METHODS["lora_prune"]
    for command, asked in (
        ("test", given),
        ("compare", without_method(given) | {"methods": ["lora_prune"]}),
        ("export", given),
    ):
        assert run(command, asked, "out") == 2
        message = refused(capsys)
        assert "holds importances of the kind param_first, but LoRAPrune chooses from lora" in message
    given["model"] |= {"path": str(save_another(tmp_path / "other")), "method": METHODS["llm_pruner"]}
    assert run("test", given, "out") == 2
    assert "these importances were collected on another model" in refused(capsys)
    file.write_text("something else")
    assert run("test", given, "out") == 2
    assert "cannot read importances" in refused(capsys)
    given["model"]["importances"] = str(file / "inside a file")
    assert run("test", given, "out") == 2
    assert "--model.importances must name a file" in refused(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_lora_prune_with_recovery_stands_beside_importances_of_another_kind(run, settings, tmp_path):
    """It collects none."""
    settings["model"]["importances"] = str(tmp_path / "importances.safetensors")
    del settings["model"]["pruning_ratio"]
    settings["trainer"]["max_steps"] = 20
    assert run("compare", comparison(settings, ["llm_pruner", "lora_prune_lora"]) | {"variants": {}}, "out") == 0
    assert Importances.load(tmp_path / "importances.safetensors").kind == "param_first"


@pytest.mark.slow
def test_recovery_of_a_ranking_over_all_layers(run, settings, tmp_path):
    """Counts differ between layers and none is skipped; what is kept is what the same choice keeps without training."""
    settings["model"] |= {"allocation": "global", "floor": 0.125, "round_to": 4}
    settings["model"]["recovery"]["learning_rate"] = 0.0
    wanda = {"class_path": "pp_lightning.methods.WandaSP"}
    assert run("fit", {**settings, "model": settings["model"] | {"method": wanda}}, "trained") == 0
    assert run("test", evaluated(settings, recovered=str(tmp_path / "trained")), "recovered") == 0
    given = evaluated(settings, method=wanda, pruning_ratio=0.4, allocation="global", floor=0.125)
    assert run("test", given, "pruned") == 0
    recovered, pruned = row(tmp_path / "recovered"), row(tmp_path / "pruned")
    assert recovered["kept"] == pruned["kept"] and pruned["kept"]["mlp"][0] < pruned["kept"]["mlp"][1]
    assert recovered["perplexity"] == pytest.approx(pruned["perplexity"], rel=1e-6)
    assert recovered["flops_ratio"] == pruned["flops_ratio"]
    uniform = {**given, "model": given["model"] | {"allocation": "uniform", "floor": None}}
    assert run("test", uniform, "uniform") == 0
    assert row(tmp_path / "uniform")["perplexity"] != pruned["perplexity"]

    settings["model"]["recovery"]["learning_rate"] = 0.01
    del settings["model"]["pruning_ratio"]
    compared = {**settings, "methods": ["wanda_sp", "wanda_sp_lora", "ppsp"], "ratios": [0.4]}
    assert run("compare", compared, "out") == 0
    assert row(tmp_path / "out", 1)["perplexity"] == pruned["perplexity"]
    assert row(tmp_path / "out", 2)["kept"] == pruned["kept"]
    assert row(tmp_path / "out", 2)["perplexity"] < pruned["perplexity"]
    assert run("compare", {**compared, "methods": ["ppsp"]}, "alone") == 0  # a recovered row before it changes nothing
    assert row(tmp_path / "out", 3)["perplexity"] == row(tmp_path / "alone", 1)["perplexity"]


@pytest.mark.parametrize("method", METHODS)
def test_gradients_have_no_ranking_by_statistics(run, settings, tmp_path, capsys, method):
    settings["model"]["allocation"] = "global"
    assert run("fit", fitted(settings, method), "out") == 2
    assert "leave out --model.allocation" in refused(capsys)
    assert run("test", evaluated(settings, method=METHODS[method], allocation="global"), "out") == 2
    assert "allocation=global ranks by calibration statistics" in refused(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_uniform_counts_are_trained_where_they_are_asked_for(run, settings, tmp_path):
    settings["model"] |= {"uniform": True, "skip_layers": None, "method": {"class_path": "pp_lightning.methods.FLAP"}}
    assert run("fit", settings, "trained") == 0
    assert Recovered.load(tmp_path / "trained").uniform
    settings["model"] |= {"uniform": False, "skip_layers": []}
    assert run("fit", settings, "ranked") == 0
    assert not Recovered.load(tmp_path / "ranked").uniform


@pytest.mark.slow
def test_commands_that_bring_their_own_rows_refuse_a_recovered_model(run, settings, tmp_path, capsys):
    assert run("fit", fitted(settings, "llm_pruner"), "trained") == 0
    given = evaluated(settings, recovered=str(tmp_path / "trained"))
    for command, more in (("compare", {"methods": ["pp"]}), ("fit", {})):
        if command == "fit":
            given = {**settings, "model": given["model"] | {"recovery": settings["model"]["recovery"]}}
        assert run(command, given | more, "out") == 2
        assert "recovered" in refused(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_compare_refuses_models_trained_otherwise(run, settings, tmp_path, capsys):
    given = comparison(settings, ["llm_pruner_lora"])
    assert run("compare", given, "out") == 0
    settings["model"]["recovery"]["rank"] = 4
    assert run("compare", given, "out") == 2
    assert "was trained with other recovery: remove it or name another --out" in refused(capsys)
    settings["model"]["recovery"]["rank"] = 8
    settings["model"]["skip_layers"] = [0]
    (tmp_path / "out" / "unfinished-compare.json").unlink()  # rows that are evaluated belong to the old amounts
    assert run("compare", given, "out") == 2
    assert "was trained with other amounts: remove it or name another --out" in refused(capsys)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_an_exported_recovered_model_is_stock_transformers(run, settings, tmp_path, method):
    settings["model"]["skip_layers"] = []
    assert run("fit", fitted(settings, method), "trained") == 0
    given = evaluated(settings, recovered=str(tmp_path / "trained"))
    assert run("export", given, "exported") == 0
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    recovered, dense = Recovered.load(tmp_path / "trained"), tiny("llama", vocab_size=VOCABULARY)
    text = ids(2, 20)
    before = logits(dense, text)
    prune_(dense, recovered.method, recovered.choices, **recovered.amounts)
    recovered.attach(dense).merge()
    torch.testing.assert_close(logits(stock, text), logits(dense, text), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(stock, text), before, atol=1e-2)
    assert not any("lora" in path for path, _ in stock.named_modules())


@pytest.mark.slow
def test_export_of_skipped_layers_says_how(run, settings, tmp_path, capsys):
    assert run("fit", fitted(settings, "llm_pruner"), "trained") == 0
    given = evaluated(settings, recovered=str(tmp_path / "trained"))
    assert run("export", given, "out") == 2
    assert "keeps the counts it was trained with, which differ between layers" in refused(capsys)
    assert not (tmp_path / "out").exists()
    assert run("export", {**given, "layout": "padded"}, "out") == 0


def change(settings, *path, to):
    *into, last = path
    for key in into:
        settings = settings[key]
    settings[last] = to


MISTAKES = {
    "no length": (("trainer", "max_steps"), -1, "set --trainer.max_steps"),
    "schedule too short": (("trainer", "max_steps"), 1, "reaches 0% of its ratio in 1 steps"),
    "dynamic method": (("model", "method"), "pp_lightning.methods.ProbePruning", "choose a static --model.method"),
    "no method": (("model", "method"), None, "choose a static --model.method"),
    "no text": (("data", "train"), None, "no training text"),
    "rows too long": (
        ("data", "train", "init_args", "window"),
        200,
        "training windows of 200 tokens exceed the model's 128",
    ),
    "too few rows": (("data", "train", "init_args", "batch_size"), 4000, "one step takes 4000: use more text"),
    "rank of zero": (("model", "recovery", "rank"), 0, "rank"),
    "negative rate": (
        ("model", "recovery", "learning_rate"),
        -1.0,
        "learning_rate, warmup_steps and a weight_decay from",
    ),
    "warm-up too long": (("model", "recovery", "warmup_steps"), 10, "warms up for 10 of 10 steps"),
    "too few documents": (
        ("data", "train"),
        {"class_path": "pp_lightning.data.FirstWindows", "init_args": {"documents": 20}},
        "documents have more than 32 tokens and 20 are asked for",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(mistake, run, settings, tmp_path, capsys):
    path, value, message = MISTAKES[mistake]
    fitted(settings, "lora_prune")
    if mistake == "too few documents":
        value["init_args"]["source"] = settings["data"]["calibration"]
    change(settings, *path, to=value)
    assert run("fit", settings, "out") == 2
    assert message in refused(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_adapters_of_another_model(run, settings, place, tmp_path, capsys):
    assert run("fit", fitted(settings, "llm_pruner"), "trained") == 0
    other = str(save_another(tmp_path / "other"))
    given = evaluated(settings, recovered=str(tmp_path / "trained"))
    assert run("test", {**given, "model": {**given["model"], "path": other}}, "out") == 2
    assert "these choices were collected on another model" in refused(capsys)
    assert run("test", {**given, "model": {**given["model"], "recovered": str(place)}}, "out") == 2
    assert "has no choices.safetensors: give the folder that a finished fit" in refused(capsys)
    assert run("test", {**given, "model": {**given["model"], "method": METHODS["llm_pruner"]}}, "out") == 2
    assert "recovered brings its own method" in refused(capsys)
    assert run("test", {**given, "model": {**given["model"], "pruning_ratio": 0.2}}, "out") == 2
    assert "was trained at ratio 0.4: leave out --model.pruning_ratio" in refused(capsys)
    assert not (tmp_path / "out").exists()


def test_compare_checks_schedules_before_it_evaluates(run, settings, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(PrunedLM, "on_test_start", None)
    settings["trainer"]["max_steps"] = 8  # the default schedule removes units every ten
    given = comparison(settings, ["lora_prune_lora"])
    assert run("compare", given, "out") == 2
    assert "the pruning schedule reaches" in refused(capsys)
    settings["model"]["recovery"]["warmup_steps"] = 10
    assert run("compare", comparison(settings, ["wanda_sp_lora"]), "out") == 2
    assert "warms up for 10 of 8 steps" in refused(capsys)
    assert not (tmp_path / "out").exists()


def test_compare_finds_a_missing_training_text_before_it_evaluates(run, settings, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(PrunedLM, "on_test_start", None)
    missing = {"class_path": "pp_lightning.data.TextFile", "init_args": {"path": "/nowhere.txt"}}
    for train in ([missing], {"class_path": "pp_lightning.data.FirstWindows", "init_args": {"source": missing}}):
        settings["data"]["train"] = train
        assert run("compare", comparison(settings, ["llm_pruner_lora"]), "out") == 2
        assert "no text file at /nowhere.txt" in refused(capsys)
    missing = {"class_path": "pp_lightning.data.Instructions", "init_args": {"path": "/nowhere.json"}}
    settings["data"]["train"] = missing
    assert run("compare", comparison(settings, ["llm_pruner_lora"]), "out") == 2
    assert "no file of instructions" in refused(capsys)
    assert not (tmp_path / "out").exists()


def test_compare_needs_a_length(run, settings, tmp_path, capsys):
    settings["trainer"]["max_steps"] = -1
    assert run("compare", comparison(settings, ["llm_pruner_lora"]), "out") == 2
    assert "set --trainer.max_steps" in refused(capsys)


def started(settings, tmp_path, out, *words):
    """The program in a process of its own."""
    config = tmp_path / f"{out}.yaml"
    config.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "cli", "fit", "--config", str(config), "--out", str(tmp_path / out), *words]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.slow
def test_a_killed_fit_ends_as_the_uninterrupted_one(run, settings, tmp_path):
    settings["trainer"]["max_steps"] = 80
    settings["model"]["recovery"]["save_every"] = 10
    assert run("fit", fitted(settings, "lora_prune"), "whole") == 0
    process, deadline = started(settings, tmp_path, "halves"), time.monotonic() + 240
    while not (tmp_path / "halves" / "unfinished.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "halves" / "choices.safetensors").exists()  # it was in the middle of it
    assert run("fit", settings, "halves") == 0
    assert losses(tmp_path / "halves")[-1] == pytest.approx(losses(tmp_path / "whole")[-1], abs=1e-4)
    assert len(losses(tmp_path / "halves")) == 80


@pytest.mark.slow
def test_two_processes_train_the_weights_of_one(run, settings, tmp_path):
    settings["model"]["recovery"] |= {"dropout": 0.0, "learning_rate": 1e-4}  # each process draws its own dropout
    settings["trainer"]["accumulate_grad_batches"] = 2
    assert run("fit", fitted(settings, "lora_prune"), "one") == 0
    settings["data"]["train"]["init_args"]["batch_size"] = 2
    process = started(settings, tmp_path, "two", "--trainer.devices", "2", "--trainer.strategy", "ddp")
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output.decode()
    one, two = adapter(tmp_path / "one"), adapter(tmp_path / "two")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5)
    first, second = (Recovered.load(tmp_path / out).choices.tensors() for out in ("one", "two"))
    assert all(torch.equal(second[name], kept) for name, kept in first.items())
    moved = max(float(tensor.abs().max()) for name, tensor in one.items() if "lora_B" in name)  # from zero
    assert moved > 4e-4, "a tolerance that tells nothing"


def tasks_of(settings, folder, **model):
    """Settings of a commonsense run on rows made up for the tests."""
    data = {"class_path": "pp_lightning.commonsense.CommonsenseData"}
    data["init_args"] = {"path": str(write_samples(folder)), "window": 64, "batch_size": 8, "calibration_samples": 4}
    return evaluated(settings, **model) | {"data": data, "trainer": {"accelerator": "cpu"}}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_tasks_of_a_recovered_model_are_those_of_the_harness(run, settings, place, tmp_path, method):
    harness = pytest.importorskip("pp_lightning.commonsense.harness")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from tests.commonsense.harness_tasks import write_definitions

    settings["trainer"]["max_steps"] = 20
    assert run("fit", fitted(settings, method), "trained") == 0
    given = tasks_of(settings, tmp_path / "rows", recovered=str(tmp_path / "trained"))
    assert run("test", given, "out") == 0
    found = row(tmp_path / "out")
    assert found["method"] == f"{method}_lora" and found["flops_ratio"] < 1

    asked = {"path": str(place / "model"), "recovered": str(tmp_path / "trained"), "device": "cpu"}
    ours = harness.PrunedHFLM(batch_size=8, max_length=64, **asked)
    recovered, model = Recovered.load(tmp_path / "trained"), tiny("llama", vocab_size=VOCABULARY)
    prune_(model, recovered.method, recovered.choices, **recovered.amounts)
    pruned = logits(model, ids(1, 20))
    recovered.attach(model).merge()
    theirs = HFLM(model, tokenizer=ours.tokenizer, batch_size=8, max_length=64)
    assert not torch.allclose(logits(model, ids(1, 20)), pruned, atol=1e-2)  # or the adapters would show nothing
    texts = [(None, [5, 6, 7], [8, 9]), (None, [9, 8], [7]), (None, [3], [2, 1, 4])]
    scores, expected = ([score for score, _ in m._loglikelihood_tokens(texts)] for m in (ours, theirs))
    assert scores == pytest.approx(expected, abs=1e-4)

    manager = TaskManager(
        include_path=str(write_definitions(tmp_path, tmp_path / "rows", limit=9)), include_defaults=False
    )
    names = [f"local_{name}" for name in found["tasks"]["tasks"]]
    results = harness.run_harness(ours.model, ours.tokenizer, names, batch_size=8, max_length=64, task_manager=manager)[
        "results"
    ]
    accuracies = {name: task["acc"] for name, task in found["tasks"]["tasks"].items()}
    assert accuracies == pytest.approx({name: results[f"local_{name}"]["acc,none"] for name in accuracies})


def test_the_harness_command_refuses_what_it_cannot_load(type_in, place, tmp_path, monkeypatch, capsys):
    tasks = pytest.importorskip("lm_eval.tasks")
    from tests.commonsense.harness_tasks import GivenTasks, write_definitions

    monkeypatch.setattr(tasks, "TaskManager", GivenTasks)
    definitions = write_definitions(tmp_path, write_samples(tmp_path / "rows"), limit=3)
    mistakes = {
        "recovered=nowhere": "nowhere has no choices.safetensors",
        "recovered=nowhere,method=pp": "recovered brings its own method: leave out method",
        "method=llm_pruner": "llm_pruner chooses from importances: name their file",
    }
    for arguments, message in mistakes.items():
        given = ["--tasks", "local_piqa", "--include_path", str(definitions), "--batch_size", "2"]
        given += ["--model_args", f"path={place / 'model'},{arguments}"]
        assert type_in("lm-eval", {}, extra=given) == 2
        assert message in refused(capsys)


def test_the_harness_prunes_by_importances_in_a_file(run, settings, place, tmp_path):
    harness = pytest.importorskip("pp_lightning.commonsense.harness")
    file = tmp_path / "importances.safetensors"
    given = evaluated(settings, method=METHODS["llm_pruner"], importances=str(file), pruning_ratio=0.4)
    given["model"]["round_to"] = 64  # as in the harness
    assert run("test", given, "out") == 0
    asked = {"path": str(place / "model"), "method": "llm_pruner", "importances": str(file), "skip_layers": 2}
    ours = harness.PrunedHFLM(batch_size=8, max_length=64, device="cpu", **asked)
    kept = kept_units(ours.model)[3]
    assert [len(kept.attention)] * 2 == row(tmp_path / "out")["kept"]["attention"]
    assert [len(kept.mlp)] * 2 == row(tmp_path / "out")["kept"]["mlp"]
