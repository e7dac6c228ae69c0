"""``pp-lightning prune``: from a checkpoint and a text to a smaller checkpoint, evaluated before and after."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pp_lightning.app.export_plan import ExportSettings
from pp_lightning.app.export_words import say
from pp_lightning.app.exporting import export_pruned
from pp_lightning.app.module import PrunedLM
from pp_lightning.app.results import Evaluation
from pp_lightning.data.datamodule import LanguageModelling
from pp_lightning.errors import UserError
from pp_lightning.export.folder import check_free
from pp_lightning.export.sizes import check_exportable
from pp_lightning.families import layers_of, shape_of
from pp_lightning.interfaces import model_inputs
from pp_lightning.methods import StaticBest, StaticMethod
from pp_lightning.pruning import pruning_of
from pp_lightning.target import Target
from pp_lightning.updating import LeastSquares

_PASSES_OF_UPDATE = 3  # over the calibration text, beside one that calibrates


def prune_and_export(
    module: PrunedLM,
    data: LanguageModelling,
    device: torch.device,
    out: Path,
    target: str | None,
    export: ExportSettings,
    evaluated: Callable[[], Evaluation],
) -> None:
    """Say what will be done, evaluate, calibrate, choose, update, evaluate again, write and verify.

    ``out`` is not there yet. Beside it, an unfinished update waits to be gone on with.

    Raises:
        UserError: a choice per batch, a target that no ratio meets, or whatever stands in the way; ``out`` is as
            before.
    """
    check_exportable(module.model)
    check_free(out, export.overwrite)
    method = module.method or StaticBest()
    if not isinstance(method, StaticMethod):
        raise UserError(f"prune writes one choice for good and {method.label} chooses per batch: name a static method")
    if export.layout == "uniform":
        module.change(uniform=True)
    if target is not None:
        shape, item = shape_of(module.model.config), next(module.model.parameters()).element_size()
        total = module.model.num_parameters()
        asked = Target.parse(target)
        settled, amounts = module.settled(method), module.amounts
        ratio = asked.ratio(shape, settled, amounts, data.window, total, item)
        stays = asked.stays(shape, settled, amounts, total, item)
        module.change(pruning_ratio=ratio, budget="flops" if asked.measure == "flops" else "params", stays=stays)
        if ratio == 0.0:
            say(f"the model meets {target} as it is: nothing will be pruned")
    module.method = None
    module.prepare(data)
    module.check_plan(method, data.window)
    data.calibration.check()
    if data.names_text:
        data.check_text()
    else:
        data.text = data.calibration
        say("no --data.text: before and after are evaluated on the calibration text itself, which flatters the result")
    module.model.to(device)
    say(_forecast(module, method, data))
    module.label = "dense"
    before = evaluated()
    module.method, module.label = method, method.label
    unfinished = out.with_name(f"{out.name}.unfinished")
    module.update_folder = unfinished

    def after() -> dict[str, Any]:
        row = evaluated()
        say(
            f"perplexity: {before.perplexity:.2f} dense, {row.perplexity:.2f} pruned, at {row.flops.layers:.3f} of the "
            f"layers' FLOPs and {_weights_left(module.model):.3f} of the weights of their heads and MLPs"
        )
        return {"dense": before.as_dict(), "pruned": row.as_dict(), "data": data.describe()}

    export_pruned(module, data, device, out, export, after)
    shutil.rmtree(unfinished, ignore_errors=True)


def _weights_left(model: PreTrainedModel) -> float:
    pruning = pruning_of(model)
    costs = {block.block: block.units for block in pruning.plan.blocks}
    keys = pruning.shape.keys
    whole = sum(costs[block].number * costs[block].cost for _, block in keys)
    gone = sum((costs[key[1]].number - left) * costs[key[1]].cost for key, left in pruning.keep.items())
    return 1 - gone / whole


@torch.no_grad()
def _forecast(module: PrunedLM, method: StaticMethod, data: LanguageModelling) -> str:
    """What will be done, and how long it will take, by the time of one batch without the head and with it."""
    settled, batches = module.settled(method), data.calibration_batches()
    inputs = model_inputs(module.model, batches[0])
    inner, whole = (_seconds(module.model, inputs, **more) for more in ({"logits_to_keep": 1}, {}))
    passes = (1 if module.reads_calibration(settled) else 0) + (_PASSES_OF_UPDATE if settled.updates else 0)
    seconds = inner * passes * len(batches) + 2 * whole * len(data.test_batches())
    alone = ""
    if settled.updates and (module.amounts.allocation or settled.allocation) in ("global", "searched"):
        tokens = sum(rows["input_ids"].numel() for rows in LeastSquares(batches).loss_rows)
        layers = len(layers_of(module.model))
        share = tokens / inputs["input_ids"].numel()  # of a batch
        seconds += share * ((layers + 2) * inner + (2 * layers + 1) * max(0.0, whole - inner))
        alone = f", {2 * layers} blocks pruned alone on {tokens} tokens" if tokens else ""
    return (
        f"{settled.label} at pruning ratio {module.settings.pruning_ratio:.3f}: about {seconds / 60:.1f} minutes for "
        f"{passes} passes over {data.calibration_samples} calibration windows of {data.window} tokens{alone} and two "
        "evaluations (fewer: --data.calibration_samples, --data.limit_tokens)"
    )


def _seconds(model: PreTrainedModel, inputs: dict[str, Any], **more: Any) -> float:
    start = time.perf_counter()
    model(**inputs, **more)
    return time.perf_counter() - start
