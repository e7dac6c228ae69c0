"""A folder appears whole or not at all, whatever happens."""

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from pp_lightning import UserError
from pp_lightning.export import export_checkpoint
from pp_lightning.export.folder import RECORD, appearing, check_free
from tests.export.test_checkpoint import pruned

ROOT = Path(__file__).parents[2]
KILLS = 20


def fill(folder, text):
    (folder / RECORD).write_text(text)
    (folder / "inner").mkdir()
    (folder / "inner" / "file").write_text(text)


def write(out, text, overwrite=False):
    with appearing(out, overwrite) as folder:
        assert not out.exists() or overwrite or not any(out.iterdir())
        fill(folder, text)


def break_off(out, error):
    with appearing(out, overwrite=True) as folder:
        fill(folder, "half")
        raise error


def test_appears_at_the_end(tmp_path):
    out = tmp_path / "deep" / "out"
    with appearing(out, overwrite=False) as folder:
        fill(folder, "one")
        assert not out.exists()
    assert (out / "inner" / "file").read_text() == "one"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [UserError("no"), RuntimeError("bug"), KeyboardInterrupt()])
def test_an_error_leaves_nothing(error, tmp_path):
    with pytest.raises(type(error)):
        break_off(tmp_path / "out", error)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_stays_without_overwrite(tmp_path):
    write(tmp_path / "out", "one")
    with pytest.raises(UserError, match="--overwrite"):
        write(tmp_path / "out", "two")
    assert (tmp_path / "out" / RECORD).read_text() == "one"


def test_overwrite_replaces_the_whole_export(tmp_path):
    write(tmp_path / "out", "one")
    (tmp_path / "out" / "old").touch()
    write(tmp_path / "out", "two", overwrite=True)
    assert (tmp_path / "out" / RECORD).read_text() == "two"
    assert not (tmp_path / "out" / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_keeps_the_old_one_until_the_new_one_is_complete(tmp_path):
    write(tmp_path / "out", "one")
    with pytest.raises(RuntimeError):
        break_off(tmp_path / "out", RuntimeError())
    assert (tmp_path / "out" / RECORD).read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_never_takes_a_folder_that_is_no_export(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(UserError, match="is not an export"):
        write(tmp_path / "out", "one", overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="not a folder"):
        check_free(tmp_path / "file", overwrite=True)


def test_what_a_killed_run_left_is_taken_away(tmp_path):
    fill_in = tmp_path / ".out.unfinished"
    fill_in.mkdir()
    fill(fill_in, "half")
    write(tmp_path / "out", "one")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_put_aside_by_a_killed_run_comes_back(tmp_path):
    write(tmp_path / ".out.replaced", "one")
    with pytest.raises(UserError, match="--overwrite"):
        write(tmp_path / "out", "two")
    assert (tmp_path / "out" / RECORD).read_text() == "one"


def test_two_at_a_time(tmp_path):
    with appearing(tmp_path / "out", overwrite=False) as folder:
        fill(folder, "first")
        with pytest.raises(UserError, match="another export"):
            write(tmp_path / "out", "second")
    assert (tmp_path / "out" / RECORD).read_text() == "first"


class FullDisk:
    free = 1000


def test_a_disk_without_space_is_seen_before(tmp_path, monkeypatch):
    monkeypatch.setattr("pp_lightning.export.folder.shutil.disk_usage", lambda _: FullDisk())
    with pytest.raises(UserError, match=r"the disk has 0\.00 GB"):
        export_checkpoint(pruned("llama"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up(tmp_path):
    """The system refuses to write on: here by a limit on the size of files."""
    model = pruned("llama")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(UserError, match="cannot write") as caught:
            export_checkpoint(model, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "\n" not in str(caught.value) and os.strerror(errno.EFBIG) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# Forks at every line: a fresh interpreter for each kill would spend its time on imports.
EXPORT_FOREVER = """
import os, sys
from pathlib import Path
from pp_lightning.export import export_checkpoint
from tests.export.test_checkpoint import pruned
model = pruned("llama")
for line in sys.stdin:
    child = os.fork()
    while child == 0:
        export_checkpoint(model, Path(sys.argv[1]), overwrite=True, max_shard_size="50KB")
    print(child, flush=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
"""


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    """Whatever stands at ``out`` is a whole export, and the next run needs no cleaning up by hand."""
    out, moments = tmp_path / "out", random.Random(0)
    found = interrupted = 0
    with forker(out) as process:
        for _ in range(KILLS):
            process.stdin.write("\n")
            child = int(process.stdout.readline())
            time.sleep(moments.uniform(0.0, 1.0))
            os.kill(child, signal.SIGKILL)
            assert process.stdout.readline() == "gone\n"
            interrupted += any(path.name.startswith(".out.") for path in tmp_path.iterdir())
            if out.exists():
                found += 1
                assert _is_whole(out)
    assert found and interrupted, "kills must fall into writing as well as behind it"
    export_checkpoint(pruned("llama"), out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def forker(out):
    return subprocess.Popen(
        [sys.executable, "-c", EXPORT_FOREVER, str(out)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        bufsize=1,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def _is_whole(folder):
    _, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    return (folder / RECORD).is_file() and not any(
        report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    )
