"""What every test starts from: a fixed seed, the default dtype, and the recorded data if there is some."""

import os
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

# Tiny tensors gain nothing from more threads, and lose a factor of ten where another job uses the other cores.
torch.set_num_threads(1)
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


@pytest.fixture
def only_traced(monkeypatch):
    """Graphs run as they were traced: that is enough to see how many there are, and what they compute."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: real(function, backend="eager", fullgraph=True))
