"""A result folder that appears whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pp_lightning.errors import UserError
from pp_lightning.records import nearest_existing

try:
    import fcntl
except ImportError:  # Windows, where a folder cannot be opened and locked either: two exports at once are not noticed
    fcntl = None  # type: ignore[assignment]

RECORD = "pruning.json"  # every export has it: the sign by which --overwrite knows what it may replace


def check_free(out: Path, overwrite: bool) -> None:
    """Refuse a destination that must not be written to, before any work is done."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"{out} is not a folder: name another one with --out")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{out} exists: name another folder with --out, or say --overwrite true")
    if not (out / RECORD).is_file():
        raise UserError(f"{out} is not an export, so it is not overwritten: name another folder with --out")


def check_space(out: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold."""
    free = shutil.disk_usage(
        nearest_existing(out.absolute().parent)
    ).free  # where it is written first: beside its place
    if free < needed:
        raise UserError(f"{out} needs {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB: free some space")


@contextmanager
def appearing(out: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder to write into, beside ``out``; it is renamed to ``out`` when the block ends without an error.

    What is left of a killed run is taken away by the next one. An export that is being replaced stays until the new
    one is complete.

    Raises:
        UserError: ``out`` must not be written to, another export is writing it, or the disk is full.
    """
    staging, replaced = (out.with_name(f".{out.name}.{suffix}") for suffix in ("unfinished", "replaced"))
    try:
        if replaced.exists() and not out.exists():
            replaced.rename(out)  # a run was killed between taking the old one away and putting the new one there
        check_free(out, overwrite)
        out.parent.mkdir(parents=True, exist_ok=True)
        with _locked(staging):
            try:
                yield staging
                _flush(staging)
                _swap(staging, out, replaced)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error


@contextmanager
def _locked(staging: Path) -> Iterator[None]:
    """An empty staging folder that no other process uses. The lock goes with the process, however it ends."""
    staging.mkdir(exist_ok=True)
    handle = None if fcntl is None else os.open(staging, os.O_RDONLY)
    try:
        if handle is not None:
            _lock(handle, staging.name)
        for leftover in staging.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _lock(handle: int, name: str) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another export is writing {name}: wait for it, or name another --out") from None


def _swap(staging: Path, out: Path, replaced: Path) -> None:
    if replaced.exists():  # a killed run had not cleared it away
        shutil.rmtree(replaced)
    if out.exists() and any(out.iterdir()):
        out.rename(replaced)
    staging.rename(out)
    shutil.rmtree(replaced, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Bring everything to the disk, so that the rename cannot overtake the content."""
    for path in [*folder.rglob("*"), folder]:
        if fcntl is None and path.is_dir():
            continue
        handle = os.open(path, os.O_RDONLY if fcntl is not None else os.O_RDWR)  # Windows flushes what it may write
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
