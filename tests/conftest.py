"""What every test starts from: a fixed seed, the default dtype, and the recorded data if there is some."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

# Tiny tensors gain nothing from more threads, and lose a factor of ten where another job uses the other cores.
torch.set_num_threads(1)
# More of them would be processes that import all of torch to compile what takes a second.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
logging.set_verbosity_error()
logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def fresh_start():
    """Each test alone gives what it gives among the others."""
    dtype = torch.get_default_dtype()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder with the recorded oracle, the checkpoints and the texts; tests that need it skip without it."""
    folder = os.environ.get("PP_LIGHTNING_DATA")
    if not folder:
        pytest.skip("set PP_LIGHTNING_DATA to the folder with oracle/, models/ and data/")
    if not Path(folder).is_dir():
        pytest.fail(f"PP_LIGHTNING_DATA is {folder}, which is not a folder")
    return Path(folder)


_STOCK = """
import json, os, sys, traceback
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what the code prints is no answer
for line in sys.stdin:
    code, folder = json.loads(line)
    os.chdir(folder)
    scope = {}
    try:
        exec(code, scope)
        assert not {"pp_lightning", "export", "lightning"} & set(sys.modules)
        answer = [scope.get("found"), None]
    except Exception:
        answer = [None, traceback.format_exc()]
    print(json.dumps(answer), file=answers, flush=True)
"""


@pytest.fixture(scope="session")
def _stock_process():
    command = [sys.executable, "-c", _STOCK]
    with subprocess.Popen(
        command, cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def in_stock_python(_stock_process):
    """Runs code in a process that has never heard of us and returns its ``found``. One process: it starts slowly."""

    def run(code, folder="/"):
        _stock_process.stdin.write(json.dumps([code, str(folder)]) + "\n")
        _stock_process.stdin.flush()
        found, error = json.loads(_stock_process.stdout.readline())
        assert error is None, error
        return found

    return run


@pytest.fixture
def only_traced(monkeypatch):
    """Graphs run as they were traced: that is enough to see how many there are, and what they compute."""
    real = torch.compile

    def traced(function, dynamic=None, **_):
        return real(function, backend="eager", fullgraph=True, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", traced)
