"""Files that hold a graph: ONNX, and PyTorch's own exported program with or without compiled kernels."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pp_lightning.export.graph import Graph
from pp_lightning.progress import Tell

# Runs a graph on its inputs in order, flat; gives its outputs in order, on the CPU.
Session = Callable[[Sequence[Tensor]], list[Tensor]]

# What the open sizes of a graph's inputs are called.
_SIZES = {
    "input_ids": ("batch", "sequence"),
    "attention_mask": ("batch", "total_sequence"),
    "past_key_values.0.key": ("batch", "heads", "past"),
}

_LARGEST_PROTOBUF = 2 * 1000**3  # bytes; the format ends at 2 GiB


@dataclass(frozen=True)
class GraphFormat:
    """How a graph is written and run again.

    Attributes:
        write: into a folder; the number of bytes of the weights is given. Tells each part of it that is slow.
        load: from the folder, in the runtime that its users have.
        packages: that are needed beside PyTorch, an extra of ours.
    """

    write: Callable[[Graph, Path, int, Tell], None]
    load: Callable[[Path, Graph], Session]
    runs_in: str
    packages: tuple[str, ...] = ()


def _write_onnx(graph: Graph, folder: Path, size: int, tell: Tell) -> None:
    assert graph.program is not None
    tell("translating the graph into ONNX")
    with _quiet():
        written = torch.onnx.export(
            graph.program,
            (),
            dynamo=True,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            verbose=False,
        )
        assert written is not None
        _name_sizes(written.model.graph)
        tell("writing model.onnx")
        written.save(folder / "model.onnx", external_data=size > _LARGEST_PROTOBUF)


def _name_sizes(graph: Any) -> None:
    """Call open sizes by what they are, in all shapes: the tracer calls them s10 or s43."""
    found: dict[str, str] = {}
    for value in graph.inputs:
        for size, name in zip(value.shape, _SIZES.get(value.name, ()), strict=False):
            if not isinstance(size, int):
                found.setdefault(str(size), name)
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    for shape in (value.shape for value in values if value.shape is not None):
        for axis, size in enumerate(shape):
            if not isinstance(size, int) and size.value is not None:
                shape[axis] = re.sub(r"\bs\d+\b", lambda symbol: found.get(symbol[0], symbol[0]), size.value)


def _load_onnx(folder: Path, graph: Graph) -> Session:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    wanted = {entry.name for entry in session.get_inputs()}
    missing = set(graph.inputs) - wanted

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        feeds = dict(zip(graph.inputs, inputs, strict=True))
        found = session.run(list(graph.outputs), {n: t.numpy() for n, t in feeds.items() if n not in missing})
        return [torch.from_numpy(array) for array in found]

    return run


def _write_program(graph: Graph, folder: Path, size: int, tell: Tell) -> None:
    assert graph.program is not None
    tell("writing model.pt2")
    torch.export.save(graph.program, folder / "model.pt2")


def _load_program(folder: Path, graph: Graph) -> Session:
    return _in_arguments(torch.export.load(folder / "model.pt2").module(), graph)


def _write_compiled(graph: Graph, folder: Path, size: int, tell: Tell) -> None:
    assert graph.program is not None
    _write_program(graph, folder, size, tell)
    tell("compiling kernels for this machine")
    torch._inductor.aoti_compile_and_package(graph.program, package_path=str(folder / "model.compiled.pt2"))


def _load_compiled(folder: Path, graph: Graph) -> Session:
    return _in_arguments(torch._inductor.aoti_load_package(str(folder / "model.compiled.pt2")), graph)


def _in_arguments(program: Callable[..., Sequence[Tensor]], graph: Graph) -> Session:
    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            laid_out = [tensor.contiguous() for tensor in inputs]  # compiled kernels take the strides for granted
            return [out.cpu() for out in program(*laid_out[: graph.leading], laid_out[graph.leading :])]

    return run


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks about packages that no language model needs."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


GRAPH_FORMATS: Mapping[str, GraphFormat] = {
    "onnx": GraphFormat(_write_onnx, _load_onnx, "ONNX Runtime", ("onnxruntime", "onnxscript")),
    "pt2": GraphFormat(_write_program, _load_program, "torch.export.load"),
    "compiled": GraphFormat(
        _write_compiled, _load_compiled, "torch.export.load; torch._inductor.aoti_load_package on this machine"
    ),
}
