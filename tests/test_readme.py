"""What the README shows runs as it stands, or it says here why not."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from pp_lightning.app.cli import main
from pp_lightning.checkpoints import EMBEDDED_MODEL
from pp_lightning.data import Embedded

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = {kind: re.findall(rf"```{kind}\n(.*?)```", README, re.DOTALL) for kind in ("bash", "python")}
COMMANDS = [line for block in BLOCKS["bash"] for line in block.replace("\\\n", " ").splitlines()]
# Commands that no test runs as they stand, and why.
NOT_RUN = {
    "python3 -m venv .venv && . .venv/bin/activate": "the Makefile does it, and CI runs that",
    "pip install -e '.[app]'": "it asks an index for gigabytes; tests/test_packaging.py installs without dependencies",
}
# Smaller than in the README, so that the tests end: the same options, shorter texts.
SMALLER = {"256": "64", "64": "16"}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the files that the README names, and nothing else."""
    (tmp_path / "calibration.txt").write_text(Embedded("calibration").text()[:60_000])
    (tmp_path / "test.txt").write_text(Embedded("test").text()[:20_000])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(command):
    """A command of ours as words, with a model and sizes for a test."""
    found = [str(EMBEDDED_MODEL) if word == "MODEL" else SMALLER.get(word, word) for word in shlex.split(command)]
    return [*found, "--model.round_to", "16", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]


OURS = [command for command in COMMANDS if command.startswith("pp-lightning") and "demo" not in command]


def test_every_command_is_run_or_has_its_reason():
    demo = ["pp-lightning demo --out results/demo"]  # tests/app/test_demo.py
    assert sorted(COMMANDS) == sorted([*OURS, *NOT_RUN, *demo])
    assert len(OURS) == 3


@pytest.mark.slow
@pytest.mark.parametrize("command", OURS, ids=lambda command: " ".join(command.split()[1:4]))
def test_the_recipes_run(command, place, monkeypatch):
    if "llama.cpp" in command:
        pytest.importorskip("gguf", reason="needs the extra gguf")
    monkeypatch.setattr(sys, "argv", words(command))
    main()
    out = place / re.search(r"--out (\S+)", command)[1]
    expected = {"compare": "results.png", "pruned": "model.safetensors", "gguf": "model.gguf"}[out.name]
    assert (out / expected).stat().st_size > 1000


def test_there_is_one_recipe_and_one_whole_snippet_in_python():
    recipe, whole = BLOCKS["python"]
    assert "MODEL" in recipe and "MODEL" not in whole


@pytest.mark.slow
def test_the_python_recipe_runs(place, capsys):
    exec(BLOCKS["python"][0].replace("MODEL", str(EMBEDDED_MODEL)), {})
    assert "The history of the city begins" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_snippet_runs_as_it_stands(capsys):
    exec(BLOCKS["python"][1], {})
    dense, pruned = map(float, re.search(r"dense ([\d.]+), pruned ([\d.]+)", capsys.readouterr().out).groups())
    assert 15 < dense < pruned < 1.5 * dense


@pytest.mark.slow
def test_the_notebook_runs():
    """Its code cells in order, as a kernel would; what a cell leaves on its last line is an expression."""
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())
    place = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "cleared, so that no figure of another machine stays"
            exec("".join(cell["source"]), place)
    found = place["found"]
    assert found["dense"] < found["best (ours)"] < found["Probe Pruning"]
    assert found["dense"] < found["static best (ours)"] < found["FLAP"]
    assert place["text"].startswith("Return a new list that contains")


def test_length():
    assert len(README.split()) <= 1300
