"""``pp-lightning export``: from the command line's settings to the exporter and back to the terminal."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from pp_lightning.app.module import PrunedLM
from pp_lightning.app.report import Grid, show_grid
from pp_lightning.checkpoints import Dtype
from pp_lightning.data.base import EvaluationData
from pp_lightning.errors import UserError
from pp_lightning.export import (
    Agreement,
    Costs,
    Layout,
    compare_layouts,
    export_checkpoint,
    export_dynamic_graph,
    export_graph,
)
from pp_lightning.export.checkpoint import cast_weights
from pp_lightning.export.costs import in_words
from pp_lightning.export.engines.check import EngineCheck, Expected, check_with
from pp_lightning.export.engines.choice import Format, choice_for
from pp_lightning.export.engines.run import Engine, check_installed
from pp_lightning.export.folder import check_free
from pp_lightning.export.formats import GRAPH_FORMATS
from pp_lightning.export.gguf_file import GgufCheck, GgufType, check_gguf, export_gguf
from pp_lightning.export.gguf_plan import check_biases, check_family
from pp_lightning.export.gguf_tokenizer import tokenizer_fields
from pp_lightning.export.int8 import check_int8
from pp_lightning.export.layouts import target_for
from pp_lightning.export.quantisers import shared_among, suits
from pp_lightning.export.record import base_model_name, calibration_record
from pp_lightning.export.sizes import PrunedSizes, check_exportable
from pp_lightning.export.verify import Int8Check
from pp_lightning.export.weights import check_shard_size
from pp_lightning.families import shape_of
from pp_lightning.methods import DynamicMethod
from pp_lightning.progress import Tell, ignore_line, write_line

Quantize = Literal["q8_0", "int8"]


@dataclass(frozen=True)
class ExportSettings:
    """What the user asked of ``export``; see :meth:`pp_lightning.app.trainer.PruningTrainer.export`."""

    format: Format | None
    layout: Layout | None
    dtype: Dtype | None
    kv_cache: bool
    overwrite: bool
    max_shard_size: str
    engine: Engine | None = None
    check_with: tuple[Engine, ...] = ()
    quantize: Quantize | None = None

    @property
    def written(self) -> Format:
        """The format: that of the engine, or a checkpoint where nothing was asked."""
        return self.format or "safetensors"

    @property
    def graph(self) -> bool:
        """Whether it holds any widths as they are."""
        return self.written in GRAPH_FORMATS

    @property
    def uniform(self) -> bool:
        """Whether all layers are to keep the same counts: by default, but in a graph only if told so."""
        return self.layout == "uniform" or (self.layout is None and not self.graph)


def export_pruned(
    module: PrunedLM,
    data: EvaluationData,
    device: torch.device,
    out: Path,
    settings: ExportSettings,
    evaluate: Callable[[], dict[str, Any]] | None = None,
) -> None:
    """Prune as the module says and write the result.

    Args:
        module: model and method.
        data: to calibrate on.
        device: to do it on.
        out: a folder that is not there yet.
        settings: what is written.
        evaluate: called between the two, for figures that the record keeps.

    Raises:
        UserError: nothing to prune, a choice per batch for a checkpoint, or whatever :mod:`export` refuses.
    """
    settings = _for_engine(module, settings)
    if module.uniform_heads and settings.layout is None and not settings.graph and _differs(module):
        settings = replace(settings, layout="per-layer")
    dynamic = _check(module, out, settings)
    if settings.uniform:
        _choose_uniformly(module)
    assert module.method is not None
    module.check_plan(module.method, module.pruning_ratio, data.window)
    _read_evidence(module, data)
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
    shared: _Shared = {
        "tokenizer": module.tokenizer,
        "overwrite": settings.overwrite,
        "provenance": provenance,
        "tell": ignore_line if module.trainer.progress_bar_callback is None else write_line,
    }
    if settings.written == "safetensors":
        _write_checkpoint(module, out, settings, shared)
    elif settings.written == "gguf":
        _write_gguf(module, out, settings, shared)
    elif dynamic:
        _write_dynamic_graph(module, data, out, settings, shared)
    else:
        check = export_graph(
            module.model, out, form=settings.written, kv_cache=settings.kv_cache, release=True, **shared
        )
        say(f"written to {out}: README.md says how it is called, pruning.json has all names of inputs and outputs")
        say(_outcome(check))
    if expected is not None:
        _check_in_engines(out, expected, settings.check_with, exact=exact)


def _read_evidence(module: PrunedLM, data: EvaluationData) -> None:
    """Take what was calibrated before, and get the data ready where anything is to be read of it."""
    file = module.read_evidence()
    method = module.method
    updates = method is not None and module.settled(method).updates
    if file is not None:
        unread = "" if updates else ", no calibration text is read"
        say(f"calibrated before: {file} is taken as it stands{unread}")
    if file is None or module.frozen_on == "text" or updates:
        module.prepare(data)


def _told_layout(module: PrunedLM, settings: ExportSettings) -> Layout:
    """The layout that is written, after what it costs and whom it suits has been said."""
    layout = settings.layout or "uniform"
    _show_costs(compare_layouts(module.model), layout)
    _say_what_suits(module, layout)
    _say_if_shared_keys_went(module)
    return layout


def _write_checkpoint(module: PrunedLM, out: Path, settings: ExportSettings, shared: "_Shared") -> None:
    layout = _told_layout(module, settings)
    costs, check = export_checkpoint(
        module.model,
        out,
        layout=layout,
        max_shard_size=settings.max_shard_size,
        release=True,
        int8=settings.quantize == "int8",
        **shared,
    )
    say(f"written to {out}: {costs.model_class}, {costs.parameters:,} parameters")
    say(_outcome(check))
    if check.int8 is not None:
        say(_int8_outcome(check.int8))


def _write_gguf(module: PrunedLM, out: Path, settings: ExportSettings, shared: "_Shared") -> None:
    layout = _told_layout(module, settings)
    kind: GgufType | None = "q8_0" if settings.quantize == "q8_0" else None
    costs, check = export_gguf(module.model, out, layout=layout, kind=kind, **shared)
    say(f"written to {out}: model.gguf, architecture {check.architecture}, {costs.parameters:,} parameters")
    say(_gguf_outcome(check))


def _write_dynamic_graph(
    module: PrunedLM, data: EvaluationData, out: Path, settings: ExportSettings, shared: "_Shared"
) -> None:
    rows, tokens = data.batch_size, data.window
    say(f"one graph for batches of {rows} x {tokens} tokens (--data.batch_size, --data.window), history in and out")
    check = export_dynamic_graph(
        module.model, out, form=settings.written, rows=rows, tokens=tokens, release=True, **shared
    )
    say(f"written to {out}: see pruning.json for the names of inputs and outputs")
    say(_outcome(check))


def _say_what_suits(module: PrunedLM, layout: Layout) -> None:
    """Quantisers that these widths do not suit, and how many devices can share them."""
    layers, shape = target_for(layout, module.model).layers, shape_of(module.model.config)
    if module.uniform_heads:
        heads, channels = layers[0].heads, [widths.channels for widths in layers]
        say(f"uniform heads: {heads} in every layer; MLPs keep {min(channels)} to {max(channels)} channels")
    counted = suits(layers, shape.head_size, shape.hidden_size)
    unsuited = [f"{name}: {number}" for name, number in counted.items() if number]
    if unsuited:
        say(f"matrices whose rows a quantiser leaves wider or refuses (choose --model.round_to): {'; '.join(unsuited)}")
    devices = shared_among(layers)
    say(f"tensor parallelism: heads and channels divide among {', '.join(map(str, devices)) or 'no number of'} devices")


def _say_if_shared_keys_went(module: PrunedLM) -> None:
    if PrunedSizes.of(module.model).key_heads:
        say(
            "single query heads went out of groups that share keys and values: each one that stays is written with "
            "keys and values of its own (counted under added)"
        )


def _check_in_engines(out: Path, expected: Expected, engines: tuple[Engine, ...], *, exact: bool) -> None:
    """Run the export in engines; one that cannot is said, and the export stays."""
    failed = []
    for engine in engines:
        try:
            say(_engine_outcome(check_with(engine, out, expected, exact=exact)))
        except UserError as reason:
            failed.append(engine)
            say(f"not confirmed by {engine}: {reason}")
    if failed:
        raise UserError(f"{out} is written, but {', '.join(failed)} did not confirm it: see above")


class _Shared(TypedDict):
    """What all exporters take."""

    tokenizer: PreTrainedTokenizerBase
    overwrite: bool
    provenance: dict[str, Any]
    tell: Tell


def _check(module: PrunedLM, out: Path, settings: ExportSettings) -> bool:
    """Refuse what can be refused before any work; returns whether the choice is made per batch."""
    check_exportable(module.model)
    check_free(out, settings.overwrite)
    check_shard_size(settings.max_shard_size)
    if module.method is None:
        raise UserError("nothing to prune: name a method with --model.method")
    for engine in settings.check_with:
        check_installed(engine)
    dynamic = isinstance(module.method, DynamicMethod) and module.frozen_on is None
    if settings.graph:
        GRAPH_FORMATS[settings.written].check()
        if settings.layout not in (None, "uniform"):
            raise UserError("a graph holds any widths as they are: --layout is for --format safetensors or gguf")
        if settings.engine is not None and (dynamic or not settings.kv_cache):
            raise UserError(
                f"{settings.engine} generates from a static choice with keys and values: freeze a choice per batch "
                "with --model.frozen_on history (or text), and leave --kv_cache true"
            )
    elif dynamic:
        raise UserError(
            f"{type(module.method).__name__} chooses per batch, which no checkpoint can: freeze its choice with "
            "--model.frozen_on history (or text), or write a graph with --format onnx (or pt2)"
        )
    if settings.written == "gguf":
        check_gguf()
        check_family(module.model.config, settings.layout or "uniform")
        check_biases(module.model, more=module.method.restores_means)
        tokenizer_fields(module.tokenizer, module.model.config.vocab_size)
    _check_quantize(settings)
    if module.is_streamed and settings.written != "safetensors":
        raise UserError(
            f"a model whose weights stay on disk is written as safetensors: convert the folder to {settings.written} "
            "afterwards, or say --model.stream false"
        )
    return dynamic


def _check_quantize(settings: ExportSettings) -> None:
    if settings.quantize == "q8_0" and settings.written != "gguf":
        raise UserError("--quantize q8_0 is for --format gguf: a transformers folder takes int8")
    if settings.quantize == "int8":
        if settings.written != "safetensors":
            raise UserError("--quantize int8 is for --format safetensors: a GGUF takes q8_0, graphs none")
        check_int8()


def _for_engine(module: PrunedLM, settings: ExportSettings) -> ExportSettings:
    """The settings with what an engine was seen to load."""
    if settings.engine is None or module.method is None:
        return settings
    choice = choice_for(
        settings.engine,
        module.model.config,
        own_counts=_differs(module),
        format=settings.format,
        layout=settings.layout,
    )
    layout = "" if choice.layout is None else f", layout {choice.layout}"
    say(f"for {settings.engine}: format {choice.format}{layout}: {choice.told}")
    return replace(settings, format=choice.format, layout=choice.layout or settings.layout)


def _differs(module: PrunedLM) -> bool:
    """Whether the choice as it is asked for leaves layers different numbers of units."""
    assert module.method is not None
    if module.uniform or module.recovered is not None:
        return module.recovered is not None and not module.recovered.uniform
    spread = module.allocation not in (None, "uniform") or (bool(module.skip_layers) and not module.uniform_heads)
    return spread or module.method.with_uniform_counts() is not module.method


def _choose_uniformly(module: PrunedLM) -> None:
    if module.recovered is not None:
        if not module.recovered.uniform:
            raise UserError(
                "a recovered model keeps the counts it was trained with, which differ between layers: export it with "
                "--layout per-layer or padded, or train it with --model.uniform true"
            )
        return
    assert module.method is not None
    if module.skip_layers or module.method.with_uniform_counts() is not module.method:
        say(
            f"layout uniform: chosen anew with the same counts in every layer, {module.pruning_ratio:.0%} over the "
            "whole model, no layer skipped. test and compare evaluate this choice with --model.uniform true "
            "--model.skip_layers null."
        )
    module.uniform = True


def _asked(module: PrunedLM) -> dict[str, Any]:
    amounts = module.amounts(module.pruning_ratio)
    asked = {**amounts, "skip_layers": list(amounts["skip_layers"])}
    return asked | {"uniform": module.uniform, "frozen_on": module.frozen_on}


def _show_costs(table: list[Costs], chosen: Layout) -> None:
    """What every layout would cost and keep, the chosen one marked."""
    headings = (
        *("layout", "class", "parameters", "of dense", "added", "FLOPs", "GB"),
        *("heads", "kv heads", "channels", "loads in"),
    )
    show_grid(Grid("what each layout of this choice costs and keeps", headings, [_cells(row, chosen) for row in table]))


def _cells(costs: Costs, chosen: Layout) -> tuple[str, ...]:
    name = f"-> {costs.layout}" if costs.layout == chosen else f"   {costs.layout}"
    if not costs.parameters:
        return name, *["-"] * 9, costs.model_class
    return (
        name,
        costs.model_class,
        f"{costs.parameters:,}",
        f"{costs.parameters_ratio:.3f}",
        f"{costs.added_parameters:,}",
        f"{costs.flops_ratio:.3f}",
        f"{costs.bytes / 1e9:.3f}",
        in_words(costs.heads),
        in_words(costs.key_heads),
        in_words(costs.channels),
        costs.loads_in,
    )


def _outcome(check: Agreement) -> str:
    text = (
        f"loaded and checked: logits differ by at most {check.largest_difference:.1e} ({check.tolerance:.1e} allowed)"
    )
    if check.same_tokens:
        text += f"; {check.same_tokens} greedy tokens are equal"
    if check.swapped_units:
        text += f"; {check.swapped_units} kept units differ by rounding"
    return text


def _int8_outcome(check: Int8Check) -> str:
    return (
        f"quantised: {check.matrices} matrices in int8, {check.bytes:,} bytes; the next token's distribution is "
        f"{check.divergence:.1e} nats from the unquantised one ({check.allowed} allowed), logits differ by at most "
        f"{check.difference:.1e} of the largest; {check.same_tokens} of {check.of_tokens} greedy tokens are equal"
    )


def _gguf_outcome(check: GgufCheck) -> str:
    text = (
        f"read again: {check.tensors} tensors differ by at most {check.largest_difference:.1e} of their largest "
        f"number; {check.bytes:,} bytes"
    )
    if check.kept_wider:
        text += f"; {len(check.kept_wider)} tensors stay in float16: q8_0 wants rows of multiples of 32"
    return text


def _engine_outcome(check: EngineCheck) -> str:
    return (
        f"run in {check.version}: {check.same_tokens} of {check.of_tokens} greedy tokens are equal, losses differ "
        f"by at most {check.loss_difference:.1e}"
    )


def say(text: str) -> None:
    """Write a line for whoever started the command."""
    Console().print(text, highlight=False, soft_wrap=True)
