"""Progress of long work: a bar in a terminal or a notebook, lines where the output goes into a file."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from transformers.utils.logging import tqdm

T = TypeVar("T")
Tell = Callable[[str], None]  # told what is going on, one line at a time

_LINE = "{desc}: {n_fmt} of {total_fmt}, {elapsed}, {remaining} left"
SECONDS = 30.0  # between two lines of one piece of work at least


def write_line(line: str) -> None:
    """Write a line on standard error at once."""
    print(line, file=sys.stderr, flush=True)


def ignore_line(line: str) -> None:
    """Write nothing: what a library is to do unless asked."""


@contextmanager
def phases(tell: Tell) -> Iterator[Tell]:
    """Tell each phase when it begins, and when it ends how long it took."""
    begun: tuple[str, float] | None = None

    def end() -> None:
        if begun is not None:
            tell(f"{begun[0]}: {time.monotonic() - begun[1]:.0f} s")

    def begin(line: str) -> None:
        nonlocal begun
        end()
        begun = line, time.monotonic()
        tell(line)

    yield begin
    end()


def shown(items: Iterable[T], name: str, unit: str, progress: bool = True) -> Iterable[T]:
    """The items, their progress shown on standard error unless ``progress`` is off."""
    if sys.stderr.isatty() or "ipykernel" in sys.modules:
        bar: Iterable[T] = tqdm(items, desc=name, unit=unit, disable=not progress)
        return bar
    lines: Iterable[T] = tqdm(
        items, desc=name, disable=not progress, file=_Lines(), bar_format=_LINE, mininterval=SECONDS, miniters=1
    )
    return lines


class Steps:
    """Lines about work of so many steps, with the time that is left."""

    def __init__(self, name: str, unit: str, total: int) -> None:
        self._name, self._unit, self._total = name, unit, total
        self._begun, self._first = time.perf_counter(), 0

    def line(self, done: int) -> str:
        """What to say when so many are done."""
        passed, mine = time.perf_counter() - self._begun, done - self._first
        left = f", {passed / mine * (self._total - done) / 60:.1f} minutes left" if mine > 0 else ""
        return f"{self._name}: {self._unit} {done} of {self._total} is done{left}"

    def skip(self, done: int) -> None:
        """An earlier run did so many."""
        self._first = done


class _Lines:
    """Gives every state of a bar, which is meant to replace the one before, a line of its own."""

    def write(self, text: str) -> None:
        """Write it without what moves a terminal's cursor."""
        if line := text.strip():
            write_line(line)

    def flush(self) -> None:
        """Written already."""
