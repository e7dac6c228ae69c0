"""The embedded corpus: parts that stay apart, and nothing imported to read them."""

import ast
import subprocess
import sys

import pytest

from pp_lightning.texts.embedded import embedded_documents, part_of

PARTS = ("train", "calibration", "test")


def test_parts_share_no_document():
    parts = [set(embedded_documents(part)) for part in PARTS]
    assert all(parts)
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]


def test_sizes_and_order():
    sizes = {part: sum(map(len, embedded_documents(part))) for part in PARTS}
    assert sizes["train"] > 5 * sizes["test"] > 500_000
    assert embedded_documents("test") == embedded_documents("test")


def test_the_hash_is_fixed():
    # If these move, every recorded figure on the embedded text is about another text.
    names = ("topic:if", "module:abc.py", "module:json/__init__.py", "module:calendar.py")
    assert [part_of(name) for name in names] == ["train", "train", "test", "train"]
    names = [f"module:m{number}.py" for number in range(2000)]
    shares = [sum(part_of(name) == part for name in names) / len(names) for part in PARTS]
    assert 0.77 < shares[0] < 0.83 and 0.08 < shares[1] < 0.12 and 0.08 < shares[2] < 0.12


def test_kinds_make_up_the_whole():
    topics, modules = embedded_documents("test", "topic"), embedded_documents("test", "module")
    assert topics and modules
    assert sorted(topics + modules) == sorted(embedded_documents("test"))


def test_code_is_another_text_and_has_no_docstring():
    documents = embedded_documents("test", "code")
    assert not set(documents) & set(embedded_documents("test"))
    nodes = [node for text in documents for node in ast.walk(ast.parse(text))]  # it is code still
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    assert not [node for node in nodes if isinstance(node, documented) and ast.get_docstring(node)]
    assert not set(documents) & set(embedded_documents("calibration", "code"))
    assert sum(map(len, documents)) > 200_000


@pytest.mark.slow
def test_reading_imports_nothing_of_the_library():
    code = (
        "import inspect, sys; from pp_lightning.texts.embedded import embedded_documents; before = set(sys.modules);"
        "embedded_documents('test');"
        "print([one for one in set(sys.modules) - before if not one.startswith('_sysconfig')])"  # says where it is
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
