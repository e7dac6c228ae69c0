"""Models that Lightning's ``ModelParallelStrategy`` spreads over two processes, from the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

REPOSITORY = Path(__file__).parents[2]
MESH = {"--trainer.strategy": "ModelParallelStrategy"}
SHARDED = MESH | {"--trainer.strategy.data_parallel_size": 2, "--trainer.strategy.tensor_parallel_size": 1}
SPLIT = MESH | {"--trainer.strategy.data_parallel_size": 1, "--trainer.strategy.tensor_parallel_size": 2}
DDP = {"--trainer.strategy": "ddp"}
PRUNED = {"--model.pruning_ratio": 0.4}


@pytest.fixture
def in_two(asked):
    """Run a command in two processes; returns its exit code and what it said."""

    def run(command, strategy, out, **more):
        given = {**asked, "--trainer.devices": 2, **strategy, **more, "--out": out}
        words = [str(word) for pair in given.items() for word in pair]
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "pp_lightning", command]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *launcher, *words], cwd=REPOSITORY, env=environment, capture_output=True, timeout=300
        )
        return done.returncode, done.stderr.decode()

    return run


def row(folder):
    return json.loads((folder / "results.json").read_text())["rows"][0]


@pytest.mark.slow
def test_sharded_weights_have_the_perplexity_of_whole_ones(in_two, type_in, asked, tmp_path):
    flap = {**PRUNED, "--model.method": "FLAP"}
    assert type_in("test", {**asked, **flap, "--out": tmp_path / "one"}) == 0
    code, said = in_two("test", SHARDED, tmp_path / "two", **flap)
    assert code == 0, said
    one, two = row(tmp_path / "one"), row(tmp_path / "two")
    assert two["tokens"] == one["tokens"]
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-6)


@pytest.mark.slow
def test_histories_of_sharded_models_are_those_of_whole_ones(in_two, type_in, asked, tmp_path):
    """Each process chooses for its own batches, and remembers these: so it is under DDP, and not in one process."""
    best = {**PRUNED, "--model.method": "ProbePruning"}
    assert type_in("test", {**asked, **best, "--out": tmp_path / "one"}) == 0
    for name, strategy in (("ddp", DDP), ("sharded", SHARDED)):
        code, said = in_two("test", strategy, tmp_path / name, **best)
        assert code == 0, said
    one, ddp, sharded = (row(tmp_path / name) for name in ("one", "ddp", "sharded"))
    assert sharded["tokens"] == ddp["tokens"] == one["tokens"]
    assert sharded["perplexity"] == pytest.approx(ddp["perplexity"], rel=1e-6)
    assert sharded["perplexity"] != pytest.approx(one["perplexity"], rel=1e-6)


@pytest.mark.slow
def test_a_model_that_is_split_is_the_same_model(in_two, type_in, asked, tmp_path):
    assert type_in("test", {**asked, "--out": tmp_path / "one"}) == 0
    code, said = in_two("test", SPLIT, tmp_path / "two")
    assert code == 0, said
    one, two = row(tmp_path / "one"), row(tmp_path / "two")
    assert two["tokens"] == one["tokens"]
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("recovers", [True, False])
def test_sharded_weights_are_trained_as_whole_ones(in_two, asked, place, tmp_path, recovers):
    given = {"--data.train": f"[{place / 'documents.jsonl'}]", "--trainer.max_steps": 4, "--model.warmup_steps": 0}
    given |= {"--trainer.limit_val_batches": 0, "--data.batch_size": 2, "--trainer.gradient_clip_val": 1.0}
    if recovers:
        given |= {**PRUNED, "--model.method": "FLAP", "--model.recovery.dropout": 0, "--model.recovery.warmup_steps": 1}
    for name, strategy in (("ddp", DDP), ("sharded", SHARDED)):
        code, said = in_two("fit", strategy, tmp_path / name, **given)
        assert code == 0, said
    file = "adapter_model.safetensors" if recovers else "model.safetensors"
    ddp, sharded = (load_file(tmp_path / name / file) for name in ("ddp", "sharded"))
    assert ddp.keys() == sharded.keys()
    for name, tensor in ddp.items():
        torch.testing.assert_close(sharded[name].float(), tensor.float(), rtol=0, atol=1e-5 if recovers else 1e-2)
    if not recovers:
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("command", ["compare", "export", "prune"])
def test_commands_that_need_the_whole_model_refuse_to_spread_it(command, type_in, asked, tmp_path, capsys):
    given = {**asked, **PRUNED, "--model.method": "FLAP", **SHARDED, "--out": tmp_path / "out"}
    given |= {"--trainer.devices": 1, "--trainer.strategy.data_parallel_size": 1}
    if command == "compare":
        del given["--model.pruning_ratio"], given["--model.method"]
    assert type_in(command, given) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pp-lightning:")]
    assert len(lines) == 1 and "needs the whole model in a process" in lines[0]
    assert not (tmp_path / "out").exists()
