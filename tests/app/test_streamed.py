"""``--stream true``: the same files and figures as in memory, and runs that go on where they were killed."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pp_lightning import checkpoints
from tests.app.conftest import VOCABULARY, tokenizer
from tests.app.test_cli import refused
from tests.models import tiny


@pytest.fixture
def asked(asked):
    """Everything but the place and how."""
    return {**asked, "--model.pruning_ratio": 0.4}


@pytest.fixture
def checkpoint(tmp_path):
    """Writes a tiny checkpoint of several shards with its tokenizer."""

    def write(name):
        folder = tmp_path / name
        tiny(name, vocab_size=VOCABULARY).save_pretrained(folder, max_shard_size="100KB")
        tokenizer().save_pretrained(folder)
        return folder

    return write


def files_of(folder):
    """Every file's bytes but the record's, whose versions and times are its own."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("pruning.json", "README.md")}


def figures_of(folder):
    """What the record says of kept units, calibration and perplexities."""
    record = json.loads((folder / "pruning.json").read_text())
    perplexities = {row: record["evaluation"][row]["perplexity"] for row in ("dense", "pruned")}
    return record["pruning"], record["calibration"], perplexities


@pytest.mark.slow
@pytest.mark.parametrize("method", ["StaticBest", "FLAP"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "opt"])
def test_a_streamed_run_writes_the_same_bytes(type_in, asked, checkpoint, tmp_path, name, method):
    given = {**asked, "--model.path": checkpoint(name), "--model.method": method, "--max_shard_size": "200KB"}
    for stream in ("true", "false"):
        assert type_in("prune", {**given, "--stream": stream, "--out": tmp_path / stream}) == 0
    assert len(files_of(tmp_path / "true")) > 4
    assert files_of(tmp_path / "true") == files_of(tmp_path / "false")
    assert figures_of(tmp_path / "true") == figures_of(tmp_path / "false")
    assert not (tmp_path / "true.unfinished").exists()


def test_stock_transformers_loads_what_was_streamed(type_in, asked, tmp_path, stock_perplexity):
    out = tmp_path / "out"
    given = {**asked, "--model.method": "WandaSP", "--stream": "true", "--layout": "uniform", "--out": out}
    assert type_in("prune", given) == 0
    record = json.loads((out / "pruning.json").read_text())
    assert stock_perplexity(out) == pytest.approx(record["evaluation"]["pruned"]["perplexity"], rel=1e-4)


def test_a_large_model_is_streamed_by_itself(type_in, asked, tmp_path, monkeypatch):
    seen, real = [], checkpoints.load_streamed
    monkeypatch.setattr("pp_lightning.checkpoints.load_streamed", lambda *given: seen.append(given) or real(*given))
    monkeypatch.setattr("pp_lightning.checkpoints.free_memory", lambda: 10**6)
    assert type_in("test", {**asked, "--model.method": "FLAP", "--out": tmp_path / "out"}) == 0
    assert len(seen) == 1
    monkeypatch.setattr("pp_lightning.checkpoints.free_memory", lambda: 10**9)
    assert type_in("test", {**asked, "--model.method": "FLAP", "--out": tmp_path / "out"}) == 0
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("command", "changes", "words"),
    [
        ("prune", {"--model.method": "StaticBest", "--model.allocation": "searched"}, "cannot be streamed"),
        ("export", {"--model.method": "WandaSP", "--format": "onnx"}, "written as safetensors"),
        ("test", {"--model.compile": "true"}, "leave stream out"),
        ("fit", {}, "training needs all weights in memory"),
    ],
)
def test_what_cannot_be_streamed_is_one_line(type_in, asked, tmp_path, capsys, command, changes, words):
    given = {**asked, "--stream": "true", "--out": tmp_path / "out"} | changes
    if "--model.method" not in given:
        del given["--model.pruning_ratio"]
    assert type_in(command, given) == 2
    assert words in refused(capsys)
    assert not (tmp_path / "out" / "pruning.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["sums", "hidden", "layer"])
def test_a_full_disk_is_one_line_and_the_run_goes_on(type_in, asked, checkpoint, tmp_path, capsys, monkeypatch, phase):
    """In the sums of a layer, in hidden states, in a pruned layer."""
    given = {**asked, "--model.path": checkpoint("llama"), "--model.method": "StaticBest", "--stream": "true"}
    assert type_in("prune", {**given, "--out": tmp_path / "whole"}) == 0
    real = Path.open

    def full(path, *args, **more):
        if f"{phase}-3" in path.name and "w" in str(args):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, *args, **more)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        assert type_in("prune", {**given, "--out": tmp_path / "out"}) == 2
    assert "No space left on device" in refused(capsys)
    assert not (tmp_path / "out").exists()
    assert type_in("prune", {**given, "--out": tmp_path / "out"}) == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("method", [None, "FLAP", "ProbePruning"])
def test_evaluations_give_the_same_figures(type_in, asked, tmp_path, method):
    rows = {}
    given = {**asked, "--model.method": method}
    if method is None:
        del given["--model.method"], given["--model.pruning_ratio"]
    for stream in ("true", "false"):
        assert type_in("test", {**given, "--stream": stream, "--out": tmp_path / stream}) == 0
        (rows[stream],) = json.loads((tmp_path / stream / "results.json").read_text())["rows"]
    assert "time" not in rows["true"]
    for key in ("perplexity", "tokens", "flops_ratio", "kept"):
        assert rows["true"][key] == rows["false"][key]


@pytest.mark.slow
def test_a_comparison_gives_the_same_figures(type_in, asked, tmp_path):
    given, rows = {**asked, "--methods": "[pp,flap,static_best]", "--ratios": "[0.2,0.4]"}, {}
    del given["--model.pruning_ratio"]
    for stream in ("true", "false"):
        assert type_in("compare", {**given, "--stream": stream, "--out": tmp_path / stream}) == 0
        content = json.loads((tmp_path / stream / "results.json").read_text())["rows"]
        rows[stream] = [(row["method"], row["perplexity"], row["degradation"], row["flops_ratio"]) for row in content]
    assert len(rows["true"]) == 7 and rows["true"] == rows["false"]


# Every run is a child of one process that has imported everything. It tells the weights that it reads, one dot each.
_DIES = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
import datasets, lightning, matplotlib.pyplot, transformers.models.llama.modeling_llama, pp_lightning.export
import pp_lightning.stored as stored
from pp_lightning.app.cli import main
values_of = stored.values_of
WEIGHTS = 9  # of a layer

def run(allowed, out):
    told, tells = os.pipe()
    child = os.fork()
    if child == 0:
        reads = 0
        def read_or_die(weight):
            nonlocal reads
            reads += 1
            os.write(tells, b".")
            if reads > allowed * WEIGHTS:
                os.kill(os.getpid(), signal.SIGKILL)
            return values_of(weight)
        stored.values_of = read_or_die
        sys.argv = ["pp-lightning", "prune", *sys.argv[1:], "--out", out]
        main()
        sys.stdout.flush()
        os._exit(0)
    os.close(tells)
    with os.fdopen(told, "rb") as dots:
        number = len(dots.read()) // WEIGHTS
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), number

whole = run(10**6, os.environ["WHOLE"])
runs = [run(STEP, os.environ["KILLED"])]
while runs[-1][0] == -signal.SIGKILL and not os.path.exists(os.environ["KILLED"]):
    runs.append(run(STEP + len(runs), os.environ["KILLED"]))
print(json.dumps({"whole": whole, "runs": runs}))
"""
_FIRST = 12  # layers that are read before anything is left behind, about


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times_ends_as_one_that_was_not(asked, checkpoint, tmp_path):
    """Killed when a certain number of layers has been read, one more each time: at any layer of any phase."""
    given = {**asked, "--model.path": checkpoint("llama"), "--model.method": "StaticBest", "--stream": "true"}
    words = [str(word) for pair in given.items() for word in pair]
    places = {"WHOLE": str(tmp_path / "whole"), "KILLED": str(tmp_path / "killed")}
    code = _DIES.replace("STEP", str(_FIRST))
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env={**os.environ, **places}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    (first, reads), runs = found["whole"], found["runs"]
    assert first == 0
    assert [code for code, _ in runs] == [-signal.SIGKILL] * (len(runs) - 1) + [0]
    assert len(runs) > 20 and runs[-1][1] < reads - 15
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
    assert figures_of(tmp_path / "killed") == figures_of(tmp_path / "whole")
