"""A user's mistake as one line, in our words where the parser's say too much."""

import re
import sys
from difflib import get_close_matches
from pydoc import locate

_UNKNOWN_CLASS = re.compile(r".*Subtypes: \[(.*?)\] Errors:.*?Expected a dot import path string: ([^\s']+)")
_KEY = re.compile(r'Parser key "([^"]+)"')
_CLASS = re.compile(r"<class '(\w+(?:\.\w+)+)'>")


def one_line(mistake: BaseException) -> str:
    """What to change."""
    text = " ".join(str(mistake).split())
    unknown = _UNKNOWN_CLASS.match(text)
    if unknown is None:
        return text
    bases, given = unknown.groups()
    names = sorted({name for base in _CLASS.findall(bases) for name in _names(locate(base))})
    if not names:
        return text
    option = ".".join(_KEY.findall(text))
    close = get_close_matches(given, names)
    return f"--{option}: there is no {given}: " + (
        f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(names)}"
    )


def _names(base: object) -> list[str]:
    """The classes below one that their packages offer; its own name where there are none."""
    assert isinstance(base, type)
    classes: list[type] = base.__subclasses__()
    below = [name for each in classes for name in _names(each)]
    package = sys.modules[base.__module__.rpartition(".")[0] or base.__module__]
    return below or [base.__name__] * hasattr(package, base.__name__)
