"""A statically pruned model as a folder with one graph."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from export.folder import appearing, check_free, check_space
from export.formats import GRAPH_FORMATS, Session
from export.graph import Graph, trace
from export.record import graph_record, pruning_record, write_record
from export.verify import Agreement, Behaviour, Runner, compare, model_runner, positions_of

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

    Raises:
        UserError: a package or disk space is missing, ``out`` is taken, or the check failed. Nothing is left behind.
    """
    chosen = GRAPH_FORMATS[form]
    chosen.check()
    check_free(out, overwrite)
    model.eval()
    size = sum(weight.nbytes for weight in model.parameters())
    check_space(out, 2 * size if form == "compiled" else size)
    dtype, layers, pruning = model.dtype, model.config.num_hidden_layers, pruning_record(model)
    longest = model.config.max_position_embeddings - 8
    expected = [
        Behaviour.of(model_runner(model), model.config.vocab_size, rows, min(tokens, longest))
        for rows, tokens in _SHAPES
    ]
    graph = trace(model, kv_cache=kv_cache)
    with appearing(out, overwrite) as folder:
        chosen.write(graph, folder, size)
        described = graph_record(graph, chosen.runs_in)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        graph = graph.without_program()
        if release:
            model.to("meta")
        run = cached_runner(chosen.load(folder, graph), graph, dtype)
        checks = [compare(e, _asked_like(e, run), dtype, layers) for e in expected]
        worst = max(checks, key=lambda check: check.largest_difference)
        record = {"pruning": pruning, "graph": described, "check": vars(worst), **(provenance or {})}
        write_record(folder, record)
    return worst


def cached_runner(session: Session, graph: Graph, dtype: torch.dtype) -> Runner:
    """Run a graph as models are run: with its cache, if it has one."""

    def run(prompt: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
        if cache is None:
            cache = [
                torch.zeros(len(prompt), n, 0, graph.head_size, dtype=dtype) for n in graph.caches for _ in range(2)
            ]
        outputs = session([prompt, mask, positions_of(mask, prompt.shape[1]), *cache])
        return outputs[0].float(), outputs[1:] or None

    return run


def _asked_like(expected: Behaviour, run: Runner) -> Behaviour:
    rows, tokens = expected.prompt.shape
    return Behaviour.of(run, expected.logits.shape[-1], rows, tokens)
