"""The documents: nothing is linked that is not there, every page is in the menu, the matrix is up to date."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from pp_lightning import kept_units, prune_
from pp_lightning.blocks import Block
from tests.models import statistics, tiny
from tests.support import full, matrix, replaced, short

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
FOLDERS = "configs|benchmarks|export|pp_lightning|tests|examples|docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for path in re.findall(rf"\b(?:{FOLDERS})/[\w/-]+\.(?:py|yaml|md|ipynb|csv)\b", text):
        assert (ROOT / path).exists(), path


def test_pages_of_the_site_do_not_leave_it():
    """Or they would be dead links there; the README is on no site."""
    for page in DOCS:
        assert not re.findall(r"\]\(\.\./", page.read_text()), page


def test_every_page_is_in_the_menu():
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(re.findall(r"[\w-]+\.md", str(menu))) == [page.name for page in DOCS]


def test_nothing_is_fetched():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert site["theme"]["font"] is False
    assert site["plugins"][1]["mkdocstrings"]["handlers"]["python"]["inventories"] == []


def test_the_method_that_is_shown_is_one():
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "adding-a-method.md").read_text(), re.DOTALL)[1]
    place = {}
    exec(code, place)
    model, stats = tiny("llama"), statistics("llama")
    prune_(model, place["LargestInputs"](), stats, pruning_ratio=0.4, skip_layers=(0, 1), round_to=16)
    for layer, kept in kept_units(model).items():
        assert torch.equal(kept.mlp, stats.energy(layer, Block.MLP).topk(len(kept.mlp)).indices.sort().values)


@pytest.mark.slow
def test_the_support_matrix_is_up_to_date():
    """``python -m tests.support`` writes it."""
    rows = matrix()
    for path, table in ((ROOT / "docs" / "support.md", full(rows)), (ROOT / "README.md", short(rows))):
        text = path.read_text()
        assert replaced(text, table) == text
    by_type = {row[0]: row[1:] for row in rows}
    assert by_type["llama"][-1] == "counts per layer" and by_type["qwen3"][-1] == "same counts"
    assert by_type["olmo2"][0].startswith("no: it normalises") and by_type["mixtral"][1].startswith("no: its channels")
    assert str(len(rows)) in re.search(r"All (\d+) types", (ROOT / "README.md").read_text())[1]
