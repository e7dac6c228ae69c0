"""``pp-lightning export``: from the command line's settings to the exporter and back to the terminal."""

from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from export import Agreement, Costs, Layout, compare_layouts, export_checkpoint
from export.folder import check_free
from export.record import base_model_name, calibration_record
from export.weights import check_shard_size
from pp_lightning.app.module import PrunedLM
from pp_lightning.app.report import Grid, show_grid
from pp_lightning.checkpoints import Dtype
from pp_lightning.data.base import EvaluationData
from pp_lightning.errors import UserError
from pp_lightning.methods import DynamicMethod

Format = Literal["safetensors"]


def export_pruned(
    module: PrunedLM,
    data: EvaluationData,
    device: torch.device,
    out: Path,
    *,
    layout: Layout,
    dtype: Dtype | None,
    overwrite: bool,
    max_shard_size: str,
) -> None:
    """Prune as the module says and write the result.

    Raises:
        UserError: nothing to prune, a choice per batch, or whatever :func:`export.export_checkpoint` refuses.
    """
    check_free(out, overwrite)
    check_shard_size(max_shard_size)
    if module.method is None:
        raise UserError("nothing to prune: name a method with --model.method")
    if isinstance(module.method, DynamicMethod) and module.frozen_on is None:
        raise UserError(
            f"{type(module.method).__name__} chooses per batch, which no checkpoint can: freeze its choice with "
            "--model.frozen_on history (or text)"
        )
    if layout == "uniform":
        _choose_uniformly(module)
    module.check_plan(module.method, module.pruning_ratio)
    calibrated = module.read_statistics()
    if calibrated:
        _say(f"calibrated before: {module.statistics_file} is taken as it stands, no calibration text is read")
    if not calibrated or module.frozen_on == "text":
        module.prepare(data)
    module.model.to(device)
    statistics = module.prune(data)
    _show_costs(compare_layouts(module.model), layout)
    provenance: dict[str, Any] = {"base_model": base_model_name(module.path), "asked": _asked(module)}
    if statistics is not None:
        provenance["calibration"] = calibration_record(statistics)
    costs, agreement = export_checkpoint(
        module.model,
        out,
        tokenizer=module.tokenizer,
        layout=layout,
        dtype=None if dtype is None else _dtype(dtype, module),
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        provenance=provenance,
        release=True,
    )
    _show_result(costs, agreement, out)


def _choose_uniformly(module: PrunedLM) -> None:
    assert module.method is not None
    if module.skip_layers or module.method.with_uniform_counts() is not module.method:
        _say(
            f"layout uniform: chosen anew with the same counts in every layer, {module.pruning_ratio:.0%} over the "
            "whole model, no layer skipped. test and compare evaluate this choice with --model.uniform true."
        )
    module.uniform = True


def _dtype(name: Dtype, module: PrunedLM) -> torch.dtype:
    chosen: torch.dtype = module.model.dtype if name == "auto" else getattr(torch, name)
    return chosen


def _asked(module: PrunedLM) -> dict[str, Any]:
    names = ("pruning_ratio", "attention_ratio", "mlp_ratio", "round_to", "uniform", "frozen_on")
    asked = {name: getattr(module, name) for name in names}
    return asked | {"skip_layers": [] if module.uniform else list(module.skip_layers)}


def _show_costs(table: list[Costs], chosen: Layout) -> None:
    """What every layout would cost and keep, the chosen one marked."""
    headings = ("layout", "class", "parameters", "of dense", "FLOPs", "GB", "heads", "channels", "loads in")
    show_grid(Grid("what each layout of this choice costs and keeps", headings, [_cells(row, chosen) for row in table]))


def _cells(costs: Costs, chosen: Layout) -> tuple[str, ...]:
    name = f"-> {costs.layout}" if costs.layout == chosen else f"   {costs.layout}"
    if not costs.parameters:
        return name, *["-"] * 7, costs.model_class
    return (
        name,
        costs.model_class,
        f"{costs.parameters:,}",
        f"{costs.parameters_ratio:.3f}",
        f"{costs.flops_ratio:.3f}",
        f"{costs.bytes / 1e9:.3f}",
        _range(costs.heads),
        _range(costs.channels),
        costs.loads_in,
    )


def _show_result(costs: Costs, check: Agreement, out: Path) -> None:
    _say(f"written to {out}: {costs.model_class}, {costs.parameters:,} parameters")
    _say(
        f"reloaded and checked: logits differ by at most {check.largest_difference:.1e} ({check.tolerance:.1e} allowed)"
        f"; {check.same_tokens} greedy tokens are equal"
    )


def _say(text: str) -> None:
    Console().print(text, highlight=False, soft_wrap=True)


def _range(counts: tuple[int, int]) -> str:
    return str(counts[0]) if counts[0] == counts[1] else f"{counts[0]}-{counts[1]}"
