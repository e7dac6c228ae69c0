"""Text that every machine already has: the running interpreter's own documentation.

Sources are ``pydoc_data.topics`` and the docstrings of the standard library. Files are parsed with ``ast``; nothing is
imported or executed. A document is one topic or one module's docstrings, and a fixed hash of its name decides
whether it trains, calibrates or tests, so the parts stay apart on every Python version.
"""

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal

Part = Literal["train", "calibration", "test"]
Kind = Literal["all", "topic", "module", "code"]

_PARTS: tuple[Part, ...] = ("train", "calibration", "test")
_EXCLUDED = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"})
_MIN_CHARACTERS = 200  # shorter documents are one-line docstrings: no context to predict from


def embedded_documents(part: Part, kind: Kind = "all") -> tuple[str, ...]:
    """Documents of one part of the interpreter's documentation: 8 of 10 train, 1 calibrates, 1 tests; in a fixed order.

    Some modules repeat another's text; such a copy is left out of a later part, so that parts share no document.
    ``topic`` is the language reference, prose; ``module`` are docstrings; ``all`` are both. ``code`` is the code of the
    standard library without its docstrings: a text of another kind.
    """
    if kind == "code":
        return _code(part)
    earlier = {text for name, text in _all_documents() if _PARTS.index(part_of(name)) < _PARTS.index(part)}
    own = (text for name, text in _all_documents() if part_of(name) == part and kind in ("all", name.partition(":")[0]))
    return tuple(text for text in own if text not in earlier)


def part_of(name: str) -> Part:
    """Part of the document called ``name``: a hash of the name alone, so it never moves."""
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 10
    return "test" if bucket == 0 else "calibration" if bucket == 1 else "train"


@lru_cache(maxsize=1)
def _all_documents() -> tuple[tuple[str, str], ...]:
    library = Path(sysconfig.get_path("stdlib"))
    documents = [*_topics(library / "pydoc_data" / "topics.py"), *_modules(library)]
    return tuple((name, text) for name, text in documents if len(text) >= _MIN_CHARACTERS)


def _topics(path: Path) -> Iterator[tuple[str, str]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    table = next(node.value for node in tree.body if isinstance(node, ast.Assign))
    for name, text in sorted(ast.literal_eval(table).items()):
        yield f"topic:{name}", text.strip()


def _modules(library: Path) -> Iterator[tuple[str, str]]:
    for name, path in _files(library):
        yield name, "\n\n".join(docstring for _, docstring in _documented(path))


@lru_cache(maxsize=3)
def _code(part: Part) -> tuple[str, ...]:
    """Code of the documented modules of that part, written anew from the syntax tree, without the docstrings."""
    texts = []
    for name, path in _files(Path(sysconfig.get_path("stdlib"))):
        if part_of(name) == part:
            nodes = [node for node, _ in _documented(path)]
            for node in nodes:
                node.body[:1] = [] if len(node.body) > 1 else [ast.Pass()]
            if nodes and isinstance(nodes[0], ast.Module):
                texts.append(ast.unparse(nodes[0]))
    return tuple(text for text in texts if len(text) >= _MIN_CHARACTERS)


def _files(library: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library).as_posix()
        if _EXCLUDED.isdisjoint(Path(name).parts):
            yield f"module:{name}", path


def _documented(path: Path) -> Iterator[tuple[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    """Every part of a file that has a docstring, and that; the module itself is the first, if it has one."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # a few standard files are deliberately not UTF-8 or not valid
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield node, docstring
