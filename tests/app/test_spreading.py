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

from tests.app.conftest import files_asked, words_of

REPOSITORY = Path(__file__).parents[2]
slow = pytest.mark.slow
MESH = {"--trainer.strategy": "ModelParallelStrategy"}
SHARDED = MESH | {"--trainer.strategy.data_parallel_size": 2, "--trainer.strategy.tensor_parallel_size": 1}
SPLIT = MESH | {"--trainer.strategy.data_parallel_size": 1, "--trainer.strategy.tensor_parallel_size": 2}
DDP = {"--trainer.strategy": "ddp"}
PRUNED = {"--model.pruning_ratio": 0.4}
FLAP = {**PRUNED, "--model.method": "FLAP"}
PROBED = {**PRUNED, "--model.method": "ProbePruning"}
TRAINED = {
    "--trainer.max_steps": 4,
    "--trainer.limit_val_batches": 0,
    "--trainer.gradient_clip_val": 1.0,
    "--model.warmup_steps": 0,
    "--data.batch_size": 2,
}
RECOVERED = {**TRAINED, **FLAP, "--model.recovery.dropout": 0, "--model.recovery.warmup_steps": 1}
# What two processes run, one after the other: starting them takes longer than all of it.
RUNS = {
    "flap": ("test", SHARDED | FLAP),
    "dense": ("test", SPLIT),
    "probed-ddp": ("test", DDP | PROBED),
    "probed": ("test", SHARDED | PROBED),
    "recovered-ddp": ("fit", DDP | RECOVERED),
    "recovered": ("fit", SHARDED | RECOVERED),
    "trained-ddp": ("fit", DDP | TRAINED),
    "trained": ("fit", SHARDED | TRAINED),
}


@pytest.fixture(scope="module")
def two(place, tmp_path_factory):
    """Folder of what two processes of one launch wrote."""
    folder = tmp_path_factory.mktemp("two")
    runs = []
    for name, (command, more) in RUNS.items():
        given = {**files_asked(place), "--trainer.devices": 2, **more, "--out": folder / name}
        if command == "fit":
            given["--data.train"] = f"[{place / 'documents.jsonl'}]"
        runs.append([command, *words_of(given)])
    (folder / "runs.json").write_text(json.dumps(runs))
    command = ["torch.distributed.run", "--nproc_per_node", "2", "-m", "tests.app.runs", str(folder / "runs.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", *command], cwd=REPOSITORY, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return folder


@pytest.fixture
def one(type_in, asked, tmp_path):
    """Evaluates in this process alone; returns the row."""

    def run(given):
        assert type_in("test", {**asked, **given, "--out": tmp_path / "one"}) == 0
        return row(tmp_path / "one")

    return run


def row(folder):
    return json.loads((folder / "results.json").read_text())["rows"][0]


@slow
@pytest.mark.parametrize(("name", "given"), [("flap", FLAP), ("dense", {})])
def test_a_model_that_is_spread_is_the_same_model(name, given, two, one):
    """Sharded weights with static choices, and a dense model that is split."""
    alone, together = one(given), row(two / name)
    assert together["tokens"] == alone["tokens"]
    assert together["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-6)


@slow
def test_histories_of_sharded_models_are_those_of_whole_ones(two, one):
    """Each process chooses for its own batches, and remembers these: so it is under DDP, and not in one process."""
    alone, ddp, sharded = one(PROBED), row(two / "probed-ddp"), row(two / "probed")
    assert sharded["tokens"] == ddp["tokens"] == alone["tokens"]
    assert sharded["perplexity"] == pytest.approx(ddp["perplexity"], rel=1e-6)
    assert sharded["perplexity"] != pytest.approx(alone["perplexity"], rel=1e-6)


@slow
@pytest.mark.parametrize(("name", "file", "atol"), [("recovered", "adapter_model", 1e-5), ("trained", "model", 1e-2)])
def test_sharded_weights_are_trained_as_whole_ones(name, file, atol, two):
    ddp, sharded = (load_file(two / run / f"{file}.safetensors") for run in (f"{name}-ddp", name))
    assert ddp.keys() == sharded.keys()
    for path, tensor in ddp.items():
        torch.testing.assert_close(sharded[path].float(), tensor.float(), rtol=0, atol=atol)
    if name == "trained":
        assert type(AutoModelForCausalLM.from_pretrained(two / name)).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("command", ["compare", "export", "prune"])
def test_commands_that_need_the_whole_model_refuse_to_spread_it(command, type_in, asked, tmp_path, capsys):
    given = {**asked, **FLAP, **SHARDED, "--out": tmp_path / "out"}
    given |= {"--trainer.devices": 1, "--trainer.strategy.data_parallel_size": 1}
    if command == "compare":
        del given["--model.pruning_ratio"], given["--model.method"]
    assert type_in(command, given) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pp-lightning:")]
    assert len(lines) == 1 and "needs the whole model in a process" in lines[0]
    assert not (tmp_path / "out").exists()
