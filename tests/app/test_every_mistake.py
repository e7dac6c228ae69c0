"""Hundreds of commands that cannot work: each is refused in one line that says what to change."""

import contextlib
import io
import re
import shlex
import sys

import pytest

from pp_lightning.app.cli import main
from tests.app.every_mistake import broken_files, commands

pytestmark = pytest.mark.slow

SMALL = (
    "--model.method=ProbePruning --model.round_to=16 --data.text={text} --data.calibration={documents} "
    "--data.window=32 --data.batch_size=4 --data.calibration_samples=4 --data.limit_tokens=300 "
    "--trainer.accelerator=cpu --trainer.enable_progress_bar=false"
)
FOREIGN = re.compile(
    r"Parser key|Subtypes|<class|NestedArg|class_path|Traceback|\w+Error\b|site-packages|torch\.\w+\(|0x"
)
ALL = list(commands())


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    return tmp_path_factory.mktemp("broken")


@pytest.fixture(scope="module")
def files(broken):
    return broken_files(broken / "files")


class _Named(dict):
    """File names may hold dots and dashes, which format fields may not."""

    def of(self, text):
        return re.sub(r"\{([\w.-]+)\}", lambda found: self[found[1]], text).replace("{{", "{").replace("}}", "}")


def run(words):
    """Exit code, and what was written on the error stream."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        before, sys.argv = sys.argv, ["pp-lightning", *words]
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        finally:
            sys.argv = before
    return code, errors.getvalue()


def listed(*folders):
    return sorted(str(path) for folder in folders for path in folder.rglob("*"))


def verdict(code, errors, says):
    lines = [line for line in errors.splitlines() if line.strip()]
    if code != 2:
        return "silent"
    if len(lines) != 1 or not lines[0].startswith("pp-lightning: ") or len(lines[0]) > 200:
        return "unclear: not one short line"
    if FOREIGN.search(lines[0]) or not re.search(says, lines[0]):
        return "unclear: in foreign words, or about something else"
    return "refused"


@pytest.mark.parametrize(("command", "says"), ALL, ids=[f"{n} {command[:70]}" for n, (command, _) in enumerate(ALL)])
def test_a_mistake_is_refused_in_one_line(command, says, broken, files, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    named = _Named(files)
    given, *words = shlex.split(named.of(command)) if command.strip() else [""]
    small = [] if given in ("benchmark", "nonsense", "tset") else shlex.split(named.of(SMALL))
    if given in ("benchmark",):
        small = ["--model.layers=1", "--repeats=1", "--warmup=1", "--cases=[{rows: 1, tokens: 16}]", "--memory=false"]
    if given in ("compare", "prune"):
        small = [word for word in small if not word.startswith("--model.method")]
    if "commonsense" in words:
        small = [word for word in small if not word.startswith(("--data.text", "--data.limit"))]
    out = ["--out=results"]
    before = listed(tmp_path, broken)
    code, errors = run([given, *small, *out, *words])
    assert verdict(code, errors, named.of(says)) == "refused", f"{code}: {errors[:2000]}"
    assert listed(tmp_path, broken) == before


def test_the_commands_without_their_mistake_work(files, tmp_path, monkeypatch):
    """The negative control: what is refused above is the mistake."""
    monkeypatch.chdir(tmp_path)
    assert run(["test", *shlex.split(_Named(files).of(SMALL)), "--out=results"])[0] == 0
    assert (tmp_path / "results" / "results.json").is_file()


def test_there_are_about_three_hundred():
    assert len({command for command, _ in ALL}) >= 300
