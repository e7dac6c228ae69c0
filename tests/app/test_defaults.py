"""What is taken where nobody says: by the checkpoint and by the device."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, MptConfig

from pp_lightning.app.trainer import PruningTrainer
from pp_lightning.data import Embedded, LanguageModelling
from pp_lightning.data.base import samples_for
from pp_lightning.errors import UserError
from tests.app.conftest import VOCABULARY, save, tokenizer
from tests.app.test_cli import refused
from tests.models import tiny


def data(**given):
    return LanguageModelling(Embedded("test"), Embedded("calibration"), **given)


def test_window_and_windows_suit_model_and_device():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for positions, window in ((512, 512), (4096, 1024)):
        found = data()
        found.suit(positions, cpu)
        assert (found.window, found.prefix, found.calibration_samples) == (window, window // 2, 64)
    found.suit(4096, gpu)
    assert found.calibration_samples == samples_for(gpu) == 512
    asked = data(window=100, calibration_samples=7)
    asked.suit(512, gpu)
    assert (asked.window, asked.calibration_samples) == (100, 7)
    with pytest.raises(UserError, match="windows of 600 tokens exceed the model's 512 positions"):
        data(window=600).suit(512, cpu)


def test_what_was_varied_after_that_stays():
    """A study varies the prompt's length from run to run."""
    found = data()
    found.suit(512, torch.device("cpu"))
    found.prefix = 32
    found.suit(512, torch.device("cpu"))
    assert found.prefix == 32


class Counting:
    """A tokenizer that notes how many texts it cut."""

    def __init__(self):
        self.real, self.texts = tokenizer(), 0
        self.pad_token_id = self.real.pad_token_id

    def __call__(self, text, **more):
        self.texts += 1
        return self.real(text, **more)


def test_calibration_text_is_cut_once():
    tokenizer, found = Counting(), data(window=16, calibration_samples=4)
    found.use_tokenizer(tokenizer)
    first, number = found.calibration_batches(), tokenizer.texts
    assert number and torch.equal(found.calibration_batches()[0]["input_ids"], first[0]["input_ids"])
    assert tokenizer.texts == number
    found.seed = 1
    assert not torch.equal(found.calibration_batches()[0]["input_ids"], first[0]["input_ids"])


@pytest.mark.parametrize(("given", "dtype"), [({}, "bfloat16"), ({"--model.dtype": "float32"}, "float32")])
def test_a_checkpoint_keeps_its_dtype(given, dtype, type_in, arguments, tmp_path):
    model = save(tiny("llama", vocab_size=VOCABULARY).bfloat16(), tmp_path / "model")
    asked = {**arguments, **given, "--model.path": model, "--out": tmp_path / "out"}
    assert type_in("test", asked) == 0
    assert f", {dtype};" in (tmp_path / "out" / "results.md").read_text()


def test_a_model_without_a_limit_of_positions(type_in, arguments, tmp_path, capsys):
    config = MptConfig(vocab_size=VOCABULARY, d_model=32, n_layers=4, n_heads=4)
    model = save(AutoModelForCausalLM.from_config(config), tmp_path / "model")
    pruned = {"--model.method": "wanda_sp", "--model.method.blocks": "[mlp]"}
    asked = {**arguments, "--model.path": model, "--model.pruning_ratio": 0.4, "--out": tmp_path / "out"}
    asked.pop("--data.window", None)
    assert type_in("test", asked | pruned) == 0
    assert "x 1024, contiguous" in (tmp_path / "out" / "results.md").read_text()
    capsys.readouterr()
    assert type_in("test", asked | pruned | {"--model.method": "pp"}) == 2  # its MLP takes the residual too
    assert "use a static method" in refused(capsys)


@pytest.mark.slow
def test_a_comparison_that_was_killed_goes_on(type_in, arguments, tmp_path, monkeypatch):
    real, seen = PruningTrainer.test, []

    def dies(self, model, **given):
        seen.append(model.label)
        if len(seen) == 3:
            raise SystemExit(137)
        return real(self, model, **given)

    extra = ["--methods", "pp,wanda_sp", "--ratios", "0.4"]
    assert type_in("compare", arguments, extra=[*extra, "--out", tmp_path / "whole"]) == 0
    monkeypatch.setattr(PruningTrainer, "test", dies)
    assert type_in("compare", arguments, extra=[*extra, "--out", tmp_path / "out"]) == 137
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["unfinished-compare.json"]
    assert type_in("compare", arguments, extra=[*extra, "--out", tmp_path / "out"]) == 0
    assert seen == ["dense", "pp", "wanda_sp", "wanda_sp"]
    whole, gone_on = (json.loads((tmp_path / n / "results.json").read_text())["rows"] for n in ("whole", "out"))
    for one, other in zip(whole, gone_on, strict=True):
        for key in ("method", "perplexity", "tokens", "kept", "flops_ratio", "settings"):
            assert other[key] == one[key], key
    assert not (tmp_path / "out" / "unfinished-compare.json").exists()


def test_rows_of_another_comparison_are_not_mixed_in(type_in, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(PruningTrainer, "test", lambda *_, **__: exec("raise SystemExit(137)"))
    out = tmp_path / "out"
    (out / "unfinished-compare.json").parent.mkdir()
    other = {"format": "pp-lightning comparison 1", "settings": {"round_to": 32}, "results": {}}
    (out / "unfinished-compare.json").write_text(json.dumps(other))
    assert type_in("compare", arguments, extra=["--methods", "pp", "--ratios", "0.4", "--out", out]) == 2
    assert "belongs to another evaluation" in refused(capsys)


CONTRADICTIONS = {
    "a ratio without a method": (
        {"--model.pruning_ratio": 0.4},
        "--model.pruning_ratio needs a method: add --method pp",
    ),
    "a floor without a ranking": ({"--method": "pp", "--model.floor": 0.5}, "add --model.allocation global"),
    "frozen_on for what is static": ({"--method": "flap", "--model.frozen_on": "history"}, "FLAP is static"),
    "uniform and skipped layers": (
        {"--method": "flap", "--model.uniform": "true", "--model.skip_layers": "[0]"},
        "add --model.skip_layers null",
    ),
    "a negative warm-up": ({"--model.warmup_steps": -1}, "--model.warmup_steps must be at least 0, not -1"),
    "no folder": ({"--out": ""}, "--out must name a folder"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_refused_before_a_model_is_loaded(name, type_in, arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pp_lightning.app.module.open_model", lambda *_, **__: pytest.fail("work was begun"))
    more, says = CONTRADICTIONS[name]
    given = {key: value for key, value in arguments.items() if key != "--model.skip_layers"}
    assert type_in("test", {**given, "--out": tmp_path / "out", **more}) == 2
    assert says in refused(capsys)


def test_what_looks_like_one_and_is_none(type_in, arguments, tmp_path):
    """A floor for a method that ranks over all layers by itself."""
    given = {**arguments, "--method": "best", "--model.floor": 0.3, "--out": tmp_path / "out"}
    assert type_in("test", given) == 0


def test_lm_eval_refuses_arguments_that_nobody_reads():
    harness = pytest.importorskip("pp_lightning.commonsense.harness")
    with pytest.raises(UserError, match="no setting in model_args 'prunning_ratio': did you mean pruning_ratio"):
        harness.PrunedHFLM(path="x", prunning_ratio=0.4)
    words = harness.with_model_args(["--tasks", "x", "--method", "pp", "--model_args", "path=DIR", "--paper"])
    assert words == ["--tasks", "x", "--model_args", "method=pp,path=DIR,calibration_samples=2000"]
