"""The support matrix, by trying: ``python -m tests.support`` writes it into docs/support.md and README.md."""

import re
from pathlib import Path

from transformers import PreTrainedModel

from pp_lightning import UserError, calibrate, prune_
from pp_lightning.blocks import Block
from pp_lightning.export.gguf_plan import KNOWN, check_biases, plan_for
from pp_lightning.export.layouts import Layout, target_for
from pp_lightning.families import FAMILIES as KINDS
from pp_lightning.families import refusal
from pp_lightning.methods import WandaSP
from pp_lightning.tables import Grid
from tests.models import FAMILIES, calibration_batches, config, tiny

ROOT = Path(__file__).parents[1]
HEADINGS = ("model type", "heads", "MLP channels", "transformers folder", "with counts per layer", "GGUF (llama.cpp)")
# llama.cpp's files hold neither short windows nor parts of rotary positions: models of these types without them.
WHOLE = {
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "phi3": {"sliding_window": None, "partial_rotary_factor": 1.0},
}


def matrix() -> list[tuple[str, ...]]:
    """One row a model type that the library describes, sorted."""
    rows = {config(name).model_type: name for name in reversed(FAMILIES)}  # of several of a type the first
    described = sorted(kind for family in KINDS for kind in family.model_types)
    return [_tried(kind, rows[kind]) if kind in rows else _not_a_language_model(kind) for kind in described]


def _tried(kind: str, name: str) -> tuple[str, ...]:
    model = tiny(name, **WHOLE.get(kind, {}))
    stats = calibrate(model, calibration_batches(), progress=False)
    able = [block for block in Block if refusal(model, block) is None and block not in FAMILIES[name].refuses]
    method = WandaSP(blocks=tuple(able))
    reasons = ["yes" if block in able else f"no: {refusal(model, block)}" for block in Block]
    prune_(model, method, stats, pruning_ratio=0.4, skip_layers=(), round_to=16)
    alike, gguf = _class(model, "uniform"), _gguf(model, "uniform")
    other = tiny(name, **WHOLE.get(kind, {}))
    prune_(other, method, stats, pruning_ratio=0.4, skip_layers=(1,), round_to=16)
    own = "yes" if _class(other, "per-layer") != "no" else "no"
    return (
        kind,
        *reasons,
        alike,
        own,
        "counts per layer" if _gguf(other, "per-layer") else "same counts" * gguf or "no",
    )


def _class(model: PreTrainedModel, layout: Layout) -> str:
    try:
        return target_for(layout, model).model_class
    except UserError:
        return "no"


def _gguf(model: PreTrainedModel, layout: Layout) -> bool:
    if model.config.model_type not in KNOWN:
        return False
    try:
        check_biases(model)
        plan_for(model, target_for(layout, model))
    except UserError:
        return False
    return True


def _not_a_language_model(kind: str) -> tuple[str, ...]:
    family = next(family for family in KINDS if kind in family.model_types)
    reasons = [f"no: {family.refusals[block]}" if block in family.refusals else "yes" for block in Block]
    return (kind, *reasons, "-", "-", "-")


def full(rows: list[tuple[str, ...]]) -> str:
    """The table of all types."""
    return Grid("", HEADINGS, rows, words=len(HEADINGS)).markdown()


def short(rows: list[tuple[str, ...]]) -> str:
    """The same with types together that can do the same, and no class names or reasons."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for kind, heads, channels, alike, own, gguf in rows:
        alike = alike if alike in ("no", "-") else "yes"
        cells = (heads.partition(":")[0], channels.partition(":")[0], alike, own, gguf)
        groups.setdefault(cells, []).append(kind)
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    lines = [(", ".join(kinds), *cells) for cells, kinds in ordered]
    return Grid("", HEADINGS, lines, words=len(HEADINGS)).markdown()


def replaced(text: str, table: str) -> str:
    """A document with the table between its two marks."""
    found = re.subn(r"(?<=<!-- support -->\n).*?(?=\n<!-- end of support -->)", lambda _: table, text, flags=re.DOTALL)
    assert found[1] == 1
    return found[0]


if __name__ == "__main__":
    rows = matrix()
    for path, table in ((ROOT / "docs" / "support.md", full(rows)), (ROOT / "README.md", short(rows))):
        path.write_text(replaced(path.read_text(), table))
