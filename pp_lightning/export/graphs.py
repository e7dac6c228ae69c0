"""A pruned model as a folder with one graph in it, checked in the runtime that its users have."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pp_lightning.export.beside import graph_card, write_beside
from pp_lightning.export.dynamic import trace_dynamic
from pp_lightning.export.dynamic_check import DynamicBehaviour
from pp_lightning.export.folder import appearing, check_free, check_space
from pp_lightning.export.formats import GRAPH_FORMATS, Session
from pp_lightning.export.graph import Graph, trace
from pp_lightning.export.packages import check_packages
from pp_lightning.export.record import graph_record, pruning_record, write_record
from pp_lightning.export.sizes import check_exportable
from pp_lightning.export.verify import (
    STEPS,
    Agreement,
    Behaviour,
    Runner,
    compare,
    model_runner,
    or_refuse,
    positions_of,
)
from pp_lightning.families import longest_text
from pp_lightning.progress import Tell, ignore_line, phases
from pp_lightning.state import pruning_state

# Rows and tokens of the prompts that a graph is checked on: none of them are those it was traced with.
_SHAPES = ((2, 24), (1, 7), (3, 33), (1, 1))


def export_graph(
    model: PreTrainedModel,
    out: Path,
    *,
    form: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    kv_cache: bool = True,
    overwrite: bool = False,
    provenance: Mapping[str, Any] | None = None,
    release: bool = False,
    tell: Tell = ignore_line,
) -> Agreement:
    """Write a model as a graph, load it in its runtime and compare it with the model at several shapes.

    Args:
        model: pruned by a static method (or dense). Layers may have widths of their own.
        out: the folder; it appears whole or not at all.
        form: ``onnx``, ``pt2`` or ``compiled``.
        tokenizer: written beside the graph.
        kv_cache: take and give keys and values; without, the graph gives logits of whole texts.
        overwrite: replace an earlier export at ``out``.
        provenance: for ``pruning.json``.
        release: give up the model's weights before the graph is loaded for the check.
        tell: told what is going on: tracing and writing a large graph take minutes.

    Raises:
        UserError: a package or disk space is missing, ``out`` is taken, or the check failed. Nothing is left behind.
    """
    _check_ready(form, model, out, overwrite)
    dtype, layers = model.dtype, model.config.num_hidden_layers
    longest = longest_text(model.config) - STEPS
    runner, vocabulary = model_runner(model), model.config.vocab_size
    expected = [Behaviour.of(runner, vocabulary, rows, min(tokens, longest)) for rows, tokens in _SHAPES]

    def check(session: Session, graph: Graph) -> Agreement:
        run = cached_runner(session, graph, dtype)
        checks = [compare(e, Behaviour.of(run, vocabulary, *e.prompt.shape), dtype, layers) for e in expected]
        return max(checks, key=lambda one: one.largest_difference)

    return _write(
        model,
        out,
        lambda: trace(model, kv_cache=kv_cache),
        form,
        check,
        tokenizer=tokenizer,
        overwrite=overwrite,
        record={"pruning": pruning_record(model), **(provenance or {})},
        release=release,
        tell=tell,
    )


def export_dynamic_graph(
    model: PreTrainedModel,
    out: Path,
    *,
    form: str,
    rows: int,
    tokens: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    provenance: Mapping[str, Any] | None = None,
    release: bool = False,
    tell: Tell = ignore_line,
) -> Agreement:
    """Write a dynamically pruned model as a graph, with its histories as inputs and outputs, and check it over batches.

    The calibrated histories to start from go into ``history.safetensors``, under the names of the graph's inputs. It is
    for batches of ``rows`` x ``tokens``: a smaller batch is filled up with rows that the mask marks as padding, and a
    shorter row is padded. All else is as for :func:`export_graph`.

    Raises:
        UserError: as :func:`export_graph`, or the batch does not fit the histories.
    """
    _check_ready(form, model, out, overwrite)
    expected = DynamicBehaviour.of(model, rows, tokens)
    dtype, layers = model.dtype, model.config.num_hidden_layers
    start = {label: tensor for label, tensor in pruning_state(model).items() if tensor.dim() > 0}
    return _write(
        model,
        out,
        lambda: trace_dynamic(model, rows, tokens),
        form,
        lambda session, _: expected.check(session, list(start.values()), dtype, layers),
        tokenizer=tokenizer,
        overwrite=overwrite,
        record={"pruning": pruning_record(model), "batch": {"rows": rows, "tokens": tokens}, **(provenance or {})},
        release=release,
        tell=tell,
        histories=start,
    )


def cached_runner(session: Session, graph: Graph, dtype: torch.dtype) -> Runner:
    """Run a graph as models are run: with its cache, if it has one."""

    def run(prompt: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
        if cache is None:
            rows, size = len(prompt), graph.head_size
            cache = [torch.zeros(rows, heads, 0, size, dtype=dtype) for heads in graph.caches for _ in range(2)]
        outputs = session([prompt, mask, positions_of(mask, prompt.shape[1]), *cache])
        return outputs[0].float(), outputs[1:] or None

    return run


def _check_ready(form: str, model: PreTrainedModel, out: Path, overwrite: bool) -> None:
    check_packages("ONNX", "onnx", *GRAPH_FORMATS[form].packages)
    check_exportable(model)
    check_free(out, overwrite)
    model.eval()
    check_space(out, _bytes(model))


def _write(
    model: PreTrainedModel,
    out: Path,
    traced: Callable[[], Graph],
    form: str,
    check: Callable[[Session, Graph], Agreement],
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    overwrite: bool,
    record: Mapping[str, Any],
    release: bool,
    tell: Tell,
    histories: Mapping[str, Tensor] | None = None,
) -> Agreement:
    size, chosen = _bytes(model), GRAPH_FORMATS[form]
    with appearing(out, overwrite) as folder, phases(tell) as begin:
        begin("tracing the model")
        graph = or_refuse(traced, "the model cannot be traced")
        chosen.write(graph, folder, size, begin)
        graph = graph.without_program()
        if histories:
            save_file(dict(histories), folder / "history.safetensors")
        write_beside(folder, model, tokenizer, graph, form)
        if release:
            model.to("meta")
        begin("loading the graph and comparing it with the model")
        failed = "the export failed its check: it cannot be loaded and run"
        agreement = or_refuse(lambda: check(chosen.load(folder, graph), graph), failed)
        described = {"graph": graph_record(graph, chosen.runs_in), "check": vars(agreement)}
        write_record(folder, {**record, **described})
        graph_card(folder, record, graph, form, agreement)
    return agreement


def _bytes(model: PreTrainedModel) -> int:
    return sum(weight.nbytes for weight in model.parameters())
