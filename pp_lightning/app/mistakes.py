"""A user's mistake as one short line, in our words where the parser's say too much."""

import re
import sys
from difflib import get_close_matches
from inspect import signature
from pydoc import locate

from pp_lightning.app.help import TYPED, known_options
from pp_lightning.errors import UserError

_LONGEST_LINE, _LONGEST_WORD = 200, 90
_START = "pp-lightning: "
_KEY = re.compile(r'Parser key "([^"]+)":')
_VALUE = re.compile(r"(?:Got|Given) value: ?(.*?)(?= ?- Expected| Subclass types| Given value type|$)")
_UNKNOWN = re.compile(r"(?:unrecognized arguments: |does not accept option |Option )'?(?:--)?([^\s'=]+)")
_NO_CLASS = re.compile(
    r"either not accessible or invalid|does not correspond to a subclass|Problem with given class_path"
)
_EXPECTED = re.compile(r"Expected a (?:<class '(\w+)'>|typing\.Literal\[([^\]]*)\])|Not a valid subclass of (\w+)")
_CLASS_PATH = re.compile(r"given class_path '([\w.]+)'")
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a word",
    "list": "a list such as [1,2]",
    "dict": "a mapping such as {name: value}",
}


def mistake_behind(error: BaseException | None) -> BaseException | None:
    """The user's mistake that caused an error: the parser wraps what a constructor refuses. None where it is ours."""
    while error is not None and not isinstance(error, _mistakes()):
        error = error.__cause__
    return error


def in_one_line(mistake: BaseException, command: str) -> str:
    """What to change."""
    if isinstance(mistake, UserError):
        text = str(mistake)
    elif isinstance(mistake, OSError):
        place = "" if mistake.filename is None else f"{mistake.filename}: "
        text = f"{place}{mistake.strerror or mistake}"
    else:
        text = _of_parser(" ".join(str(mistake).split()), command)
    return _short(_START + " ".join(text.split()))


def _mistakes() -> tuple[type[BaseException], ...]:
    """Classes of errors that are the user's business: those of packages only where they are loaded."""
    places = (("jsonargparse", "ArgumentError"), ("lightning.fabric.utilities.exceptions", "MisconfigurationException"))
    return (UserError, OSError, *(getattr(sys.modules[name], kind) for name, kind in places if name in sys.modules))


def _of_parser(text: str, command: str) -> str:
    option = ".".join(_KEY.findall(text))
    option = TYPED.get(option, option)
    if unknown := _UNKNOWN.search(text):
        return _no_option(option, unknown[1], text, command)
    if not option:
        return text
    last = text[[found.start() for found in _KEY.finditer(text)][-1] :]
    value = _VALUE.search(last)
    given = "" if value is None or value[1].startswith("NestedArg") else f", not {_quoted(value[1])}"
    if value and _NO_CLASS.search(last) and given:
        return f"--{option}: there is no {_quoted(value[1])}: see pp-lightning {command} --help"
    kinds = _expected(last[: value.start()] if value else last)
    if not kinds:
        return f"--{option}: this does not fit{given}: see pp-lightning {command} --help"
    return f"--{option}: expected {' or '.join(kinds)}{given}"


def _expected(text: str) -> list[str]:
    """The kinds of values that a message says were expected, in words, nothing twice."""
    kinds: list[str] = []
    for found in _EXPECTED.finditer(text):
        if found[1] == "NoneType":
            continue
        words = found[2] and found[2].replace("'", "")
        kinds.append(words or _KINDS.get(found[1], found[1]) if not found[3] else f"a {found[3]}")
    return list(dict.fromkeys(kinds))


def _no_option(option: str, name: str, text: str, command: str) -> str:
    """A key that is not there, with the nearest ones that are: of the command, or of a class that it was meant for."""
    if text.startswith("unrecognized arguments") and not text.startswith("unrecognized arguments: --"):
        return f"there is no option {name!r}: options start with --"
    classes = _CLASS_PATH.findall(text)
    owner = locate(classes[-1]) if classes else None
    start = f"{option}." if option else ""
    known = [start + one for one in signature(owner).parameters] if callable(owner) else known_options(command)
    near = [one for one in get_close_matches(start + name, known, n=3, cutoff=0.75) if one != start + name][:2]
    hint = f"did you mean --{' or --'.join(near)}?" if near else f"see pp-lightning {command} --help"
    if callable(owner) and not near:
        hint = f"choose from {', '.join(signature(owner).parameters)}"
    return f"--{start}{name} is no option of {owner.__name__ if isinstance(owner, type) else command}: {hint}"


def _quoted(value: str) -> str:
    return value if value[:1] in ("'", "[", "{") else f"'{value}'"


def _short(text: str) -> str:
    """At most 200 characters: long words, mostly paths, lose their middle, and then the line its end.

    Half characters of file names, which no terminal takes, become question marks.
    """
    words = [
        word if len(word) <= _LONGEST_WORD else f"{word[:20]}...{word[23 - _LONGEST_WORD :]}"
        for word in text.split(" ")
    ]
    text = " ".join(words).encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= _LONGEST_LINE else text[: _LONGEST_LINE - 4].rpartition(" ")[0] + " ..."
