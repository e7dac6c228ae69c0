"""What an installation has: a wheel, an editable one, a source distribution. Nothing is fetched."""

import ast
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from pp_lightning.export.folder import appearing

ROOT = Path(__file__).parents[1]
LEFT_BEHIND = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "*.egg-info", ".*_cache", ".engines")


def left_behind(folder, names):
    """What builds and runs leave among the sources."""
    at_top = {"build", "results"} if Path(folder) == ROOT else set()
    return LEFT_BEHIND(folder, names) | at_top


def run(*words, **more):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, **more)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The sources alone."""
    place = tmp_path_factory.mktemp("sources") / "pp-lightning"
    return shutil.copytree(ROOT, place, symlinks=True, ignore=left_behind)


def built(copy, kind, place):
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(place)!r})"
    run(sys.executable, "-c", code, cwd=copy)
    [found] = place.iterdir()
    return found


@pytest.fixture(scope="module")
def wheel(copy, tmp_path_factory):
    return built(copy, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def environment(tmp_path):
    """A new environment that sees the packages of this one behind its own; returns its Python and site-packages."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env")
    [site] = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return tmp_path / "env" / "bin" / "python", site


def install(python, *what):
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    run(sys.executable, "-m", "pip", "--python", python, "install", "--ignore-installed", *offline, *what)


def check_commands(python, cwd):
    """The program and all of the library, from a folder where no sources are."""
    clean = {"PATH": "/usr/bin:/bin", "HOME": str(cwd)}
    assert "0.1.0" in run(python.parent / "pp-lightning", "--version", cwd=cwd, env=clean)
    code = "import pp_lightning.export, pp_lightning.app.cli, pp_lightning as p; print(p.__file__)"
    return Path(run(python, "-c", code, cwd=cwd, env=clean).strip())


@pytest.mark.slow
def test_a_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"pp_lightning", "pp_lightning-0.1.0.dist-info"}
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "pp_lightning").rglob("*.py")}
    assert sources == {name for name in names if name.endswith(".py")}
    for needed in ("py.typed", "assets/tiny-llama/model.safetensors", "export/bundled/per_layer.py", "app/cli.py"):
        assert f"pp_lightning/{needed}" in names


@pytest.mark.slow
def test_an_installed_wheel_runs(wheel, environment, tmp_path):
    python, site = environment
    install(python, wheel)
    here = {path.name for path in site.iterdir()} - {"others.pth", "__pycache__"}
    assert here == {"pp_lightning", "pp_lightning-0.1.0.dist-info"}
    assert check_commands(python, tmp_path).is_relative_to(site)


@pytest.mark.slow
def test_an_editable_installation_runs(copy, environment, tmp_path):
    python, site = environment
    install(python, "--editable", copy)
    here = {path.name for path in site.iterdir()} - {"others.pth", "__pycache__"}
    assert not [name for name in here if "pp_lightning" not in name]
    assert check_commands(python, tmp_path).is_relative_to(copy)


@pytest.mark.slow
def test_a_source_distribution_is_complete(copy, tmp_path):
    with tarfile.open(built(copy, "sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("no git repository to compare with")
    assert set(tracked.stdout.split()) - names == {"export"}  # the link: what it leads to is there


@pytest.mark.slow
def test_without_the_extra_the_program_says_what_to_install(tmp_path):
    code = (
        "import sys; sys.modules['lightning'] = None; sys.argv = ['pp-lightning', 'test']\n"
        "from pp_lightning.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].endswith("pip install 'pp-lightning[app]'")


UNIX = {"fcntl", "grp", "pwd", "resource", "termios"}


def test_nothing_needs_unix_to_be_imported():
    """At the top of a module such an import stands in a ``try``."""
    found = {}
    for path in (ROOT / "pp_lightning").rglob("*.py"):
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {alias.name for node in top for alias in node.names} | {getattr(node, "module", None) for node in top}
        found[path.name] = names & UNIX
    assert found and not any(found.values()), found


def test_exports_appear_where_nothing_can_be_locked(tmp_path, monkeypatch):
    monkeypatch.setattr("pp_lightning.export.folder.fcntl", None)
    with appearing(tmp_path / "out", overwrite=False) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("x")
    assert (tmp_path / "out" / "inner" / "file").read_text() == "x"
