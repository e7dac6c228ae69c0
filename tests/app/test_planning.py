"""``pp-lightning plan``: what it says against models that are made, and against published numbers."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from pp_lightning.app.planning import Speeds, planned, read_config, seconds
from pp_lightning.families import layers_of
from pp_lightning.workload import JOBS, Sizes, Workload, memory, work_flops
from tests.app.test_cli import refused
from tests.models import config, tiny

SHAPES = Path(__file__).parents[2] / "configs" / "shapes"
# billions of parameters, as the models' makers or papers give them
PUBLISHED = {
    "llama-2-7b": 6.74,
    "llama-2-13b": 13.02,
    "llama-3-8b": 8.03,
    "llama-3-70b": 70.55,
    "opt-13b": 12.85,
    "qwen3-32b": 32.76,
    "gemma-3-27b": 27.0,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name):
    sizes = Sizes.of(read_config(str(SHAPES / f"{name}.json")), torch.bfloat16)
    assert sizes.parameters / 1e9 == pytest.approx(PUBLISHED[name], abs=0.015)
    assert sizes.whole == 2 * sizes.parameters


def test_every_shape_that_comes_with_the_package_is_checked():
    assert {path.stem for path in SHAPES.glob("*.json")} == PUBLISHED.keys()


@pytest.mark.parametrize("name", ["llama", "llama_gqa", "opt", "gemma3_text"])
def test_sizes_are_those_of_the_model(name):
    model, sizes = tiny(name), Sizes.of(config(name), torch.float32)
    layers = sum(weight.nbytes for layer in layers_of(model) for weight in layer.parameters())
    assert sizes.whole == sum(weight.nbytes for weight in model.parameters())
    assert sizes.outside + layers == sizes.whole


def test_streaming_pays_where_a_model_is_deep():
    sizes, work = Sizes.of(read_config(str(SHAPES / "llama-3-70b.json")), torch.bfloat16), Workload(4, 128, 16, 2000)
    for job in JOBS:
        whole, streamed = (memory(sizes, work, job, streamed=way) for way in (False, True))
        assert streamed < whole / 2
        assert job == "export" or whole > sizes.whole > streamed


def test_flops_are_of_all_batches():
    sizes = Sizes.of(config("llama"), torch.float32)
    one, two = (work_flops(sizes, Workload(2, 16, 8, tokens), "evaluation") for tokens in (64, 128))
    assert two == 2 * one > 0


def test_an_update_counts_blocks_that_are_pruned_alone():
    """On a tenth of the calibration text, and on no more than 4,096 tokens."""
    sizes, alone = Sizes.of(config("llama"), torch.float32), []
    for rows in (40, 160, 320):
        work = Workload(4, 256, rows)
        passes = 0.25 * 1.5 + 1.5 + 1 - work.pruning_ratio  # without them
        alone.append(work_flops(sizes, work, "update") - passes * work_flops(sizes, work, "calibration"))
    assert alone[1] == pytest.approx(alone[2]) == pytest.approx(4 * alone[0]) and alone[0] > 0


def test_devices_share_the_evaluation_alone():
    sizes, work, speeds = Sizes.of(config("llama"), torch.float32), Workload(2, 16, 8, 64), Speeds(*[1e9] * 6)
    for job in JOBS:
        one, four = (seconds(job, sizes, work, number, speeds, streamed=False) for number in (1, 4))
        assert four == pytest.approx(one / 4 if job == "evaluation" else one)


def test_the_command_needs_a_config_alone(type_in, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(config("llama").to_dict()))
    assert type_in("plan", {"--model.path": tmp_path, "--measure": "false"}) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert all(job in printed for job in JOBS) and "parameters" in printed
    assert type_in("plan", {"--model.path": tmp_path / "nowhere"}) == 2
    assert "cannot read a model config" in refused(capsys)


def test_options_have_the_names_and_defaults_of_other_commands(type_in, tmp_path, capsys, monkeypatch):
    built_for = lambda check_available=False: None if check_available else torch.device("cuda")  # noqa: E731
    monkeypatch.setattr(torch.accelerator, "current_accelerator", built_for)
    (tmp_path / "config.json").write_text(json.dumps(config("llama", max_position_embeddings=64).to_dict()))
    given = {"--model.path": tmp_path, "--measure": "false", "--trainer.devices": 2}
    assert type_in("plan", given) == 0
    assert "batch of 20 x 64; 64 calibration rows" in " ".join(capsys.readouterr().out.split())
    asked = {"--data.window": 32, "--data.batch_size": 4, "--data.calibration_samples": 8, "--model.pruning_ratio": 0.2}
    assert type_in("plan", given | asked) == 0
    assert "batch of 4 x 32; 8 calibration rows" in " ".join(capsys.readouterr().out.split())
    wrong = (("--data.window", 0), ("--data.window", 65), ("--trainer.devices", 0), ("--model.pruning_ratio", 1.5))
    for option, value in wrong:
        assert type_in("plan", given | {option: value}) == 2
        assert refused(capsys)


def test_what_no_command_prunes_is_said(type_in, tmp_path, capsys):
    GPT2Config(n_embd=32, n_layer=2, n_head=2).save_pretrained(tmp_path)
    assert type_in("plan", {"--model.path": tmp_path, "--measure": "false"}) == 0
    assert "the attention of gpt2 cannot be pruned" in " ".join(capsys.readouterr().out.split())


def test_a_table_without_a_measurement_has_no_times():
    sizes = Sizes.of(config("llama"), torch.float32)
    assert {cell for row in planned("x", sizes, Workload(), 1, None).rows for cell in row[4:]} == {"-"}
    rows = planned("x", sizes, Workload(), 1, Speeds(*[1e9] * 6)).rows
    assert all(float(cell) >= 0 for row in rows for cell in row[4:])


def test_nothing_is_loaded(monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    assert Sizes.of(read_config(str(SHAPES / "llama-3-70b.json")), torch.bfloat16).parameters > 70e9
