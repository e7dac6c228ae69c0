"""``pp-lightning export``: from the command line's settings to the exporter and back to the terminal."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pp_lightning.app.export_plan import ExportSettings, chooses_per_batch, settled
from pp_lightning.app.export_words import say, say_what_layouts_cost
from pp_lightning.app.module import PrunedLM
from pp_lightning.data.base import EvaluationData
from pp_lightning.errors import UserError
from pp_lightning.export import export_checkpoint, export_dynamic_graph, export_graph
from pp_lightning.export.checkpoint import cast_weights
from pp_lightning.export.engines.check import Expected, check_with
from pp_lightning.export.engines.run import Engine
from pp_lightning.export.gguf_file import export_gguf
from pp_lightning.export.record import base_model_name, calibration_record
from pp_lightning.progress import ignore_line, write_line


def export_pruned(
    module: PrunedLM,
    data: EvaluationData,
    device: torch.device,
    out: Path,
    settings: ExportSettings,
    evaluate: Callable[[], dict[str, Any]] | None = None,
) -> None:
    """Prune as the module says and write the result.

    ``evaluate`` is called between the two, for figures that the record keeps.
    """
    settings = settled(module, out, settings)
    assert module.method is not None
    module.check_plan(module.method, data.window)
    _read_calibration_data(module, data)
    module.model.to(device)
    statistics = module.prune(data)
    provenance: dict[str, Any] = {"base_model": base_model_name(module.path), "asked": _asked(module)}
    if statistics is not None:
        provenance["calibration"] = calibration_record(statistics)
    if evaluate is not None:
        provenance["evaluation"] = evaluate()
    if settings.dtype not in (None, "auto"):
        cast_weights(module.model, getattr(torch, str(settings.dtype)))
    exact = module.model.dtype == torch.float32 and settings.quantize is None
    expected = Expected.of(module.model) if settings.check_with else None
    say(_written(module, data, out, settings, provenance))
    if expected is not None:
        _check_in_engines(out, expected, settings.check_with or [], exact=exact)


def _read_calibration_data(module: PrunedLM, data: EvaluationData) -> None:
    """Take what was calibrated before, and get the data ready where anything is to be read of it."""
    file = module.read_calibration_data()
    method = module.method
    updates = method is not None and module.settled(method).updates
    if file is not None:
        unread = "" if updates else ", no calibration text is read"
        say(f"calibrated before: {file} is taken as it stands{unread}")
    if file is None or module.settings.frozen_on == "text" or updates:
        module.prepare(data)


def _written(
    module: PrunedLM, data: EvaluationData, out: Path, settings: ExportSettings, provenance: dict[str, Any]
) -> str:
    """Write in the format that was asked for; returns what the check of it found."""
    shared: dict[str, Any] = {
        "tokenizer": module.tokenizer,
        "overwrite": settings.overwrite,
        "provenance": provenance,
        "tell": ignore_line if module.trainer.progress_bar_callback is None else write_line,
    }
    if not settings.graph:
        shared["layout"] = settings.layout or "uniform"
        say_what_layouts_cost(module, shared["layout"])
        if settings.written == "gguf":
            costs, read = export_gguf(module.model, out, kind="q8_0" if settings.quantize == "q8_0" else None, **shared)
            say(f"written to {out}: model.gguf, architecture {read.architecture}, {costs.parameters:,} parameters")
            return read.told
        int8, size = settings.quantize == "int8", settings.max_shard_size
        costs, check = export_checkpoint(module.model, out, max_shard_size=size, release=True, int8=int8, **shared)
        say(f"written to {out}: {costs.model_class}, {costs.parameters:,} parameters")
        return check.told
    shared |= {"form": settings.written, "release": True}
    if chooses_per_batch(module):
        rows, tokens = data.batch_size, data.window
        say(f"one graph for batches of {rows} x {tokens} tokens (--data.batch_size, --data.window), history in and out")
        check = export_dynamic_graph(module.model, out, rows=rows, tokens=tokens, **shared)
        say(f"written to {out}: see pruning.json for the names of inputs and outputs")
    else:
        check = export_graph(module.model, out, kv_cache=settings.kv_cache, **shared)
        say(f"written to {out}: README.md says how it is called, pruning.json has all names of inputs and outputs")
    return check.told


def _check_in_engines(out: Path, expected: Expected, engines: Sequence[Engine], *, exact: bool) -> None:
    """An engine that cannot run the export is said, and the export stays."""
    failed = []
    for engine in engines:
        try:
            say(check_with(engine, out, expected, exact=exact).told)
        except UserError as reason:
            failed.append(engine)
            say(f"not confirmed by {engine}: {reason}")
    if failed:
        raise UserError(f"{out} is written, but {', '.join(failed)} did not confirm it: see above")


def _asked(module: PrunedLM) -> dict[str, Any]:
    asked = module.amounts.recorded()
    more = {"uniform": module.settings.uniform, "frozen_on": module.settings.frozen_on}
    return asked | {"skip_layers": list(asked["skip_layers"])} | more
