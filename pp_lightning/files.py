"""Reading the user's files: whatever is wrong with one is a mistake in one line."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pp_lightning.errors import UserError


def is_file(path: str | Path) -> bool:
    """Whether a file is there; a path that cannot be one is none."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # too long, links in a circle, a zero byte
        return False


def is_folder(path: str | Path) -> bool:
    """The same for a folder."""
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False


def check_file(path: str | Path, kind: str) -> None:
    """Refuse a path where no file is."""
    if not is_file(path):
        raise UserError(f"no {kind} at {path}: give the path of an existing file")


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turns what goes wrong while a file is read into our words.

    Raises:
        UserError: the file cannot be read, is damaged, is no UTF-8 text or no JSON.
    """
    try:
        yield
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it first") from error
    except json.JSONDecodeError as error:
        raise UserError(f"cannot read {path}: no JSON at line {error.lineno} ({error.msg})") from error
    except RecursionError as error:
        raise UserError(f"cannot read {path}: its lists or objects lie too deep in each other") from error
    except (OSError, EOFError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def read_text(path: str | Path, kind: str = "text file") -> str:
    """A whole UTF-8 file."""
    check_file(path, kind)
    with reading(path):
        return Path(path).read_text(encoding="utf-8")


def read_json(path: str | Path, kind: str = "JSON file") -> Any:
    """What a JSON file holds."""
    text = read_text(path, kind)
    with reading(path):
        return json.loads(text)


def checked_text(text: object, where: str) -> str:
    """``text`` if it is text that a tokenizer can read.

    Raises:
        UserError: it is no string, or holds half of a character (a lone surrogate).
    """
    if not isinstance(text, str):
        raise UserError(f"{where}: the text must be a string")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{where}: the text holds half of a character (a lone surrogate)")
    return text
