"""A statically pruned model as one GGUF file for llama.cpp, read again tensor by tensor."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pp_lightning.errors import UserError
from pp_lightning.export.costs import Costs, costs_of
from pp_lightning.export.folder import appearing, check_free, check_space
from pp_lightning.export.gguf_plan import GgufPlan, GgufTensor, check_biases, check_family, plan_for
from pp_lightning.export.gguf_tokenizer import tokenizer_fields
from pp_lightning.export.layouts import Layout, target_for
from pp_lightning.export.packages import check_packages
from pp_lightning.export.record import gguf_card, pruning_record, write_record
from pp_lightning.progress import Tell, ignore_line

GgufType = Literal["float32", "float16", "bfloat16", "q8_0"]
FILE = "model.gguf"

# llama.cpp's numbers of file types, and the names of tensor types in the gguf package.
_FILE_TYPES: Mapping[GgufType, int] = {"float32": 0, "float16": 1, "bfloat16": 32, "q8_0": 7}
_TENSOR_TYPES: Mapping[GgufType, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
_BLOCK = 32  # numbers that share a scale in q8_0
# What a type may change, relative to the largest number of a tensor.
_ROUNDING: Mapping[GgufType, float] = {"float32": 0.0, "float16": 2**-10, "bfloat16": 2**-8, "q8_0": 2**-7}


@dataclass(frozen=True)
class GgufCheck:
    """What was read again.

    Attributes:
        largest_difference: of a number from the model's, relative to the largest of its tensor; rounding to the type.
        kept_wider: tensors whose rows q8_0's blocks do not divide: float16 instead.
    """

    architecture: str
    tensors: int
    bytes: int
    largest_difference: float
    kept_wider: tuple[str, ...] = ()

    @property
    def told(self) -> str:
        """For people."""
        text = (
            f"read again: {self.tensors} tensors differ by at most {self.largest_difference:.1e} of their largest "
            f"number; {self.bytes:,} bytes"
        )
        wider = f"; {len(self.kept_wider)} tensors stay in float16: q8_0 wants rows of multiples of 32"
        return text + wider if self.kept_wider else text


def gguf_type_of(dtype: torch.dtype) -> GgufType:
    """The type that holds a dtype as it is."""
    for name in _FILE_TYPES:
        if str(dtype) == f"torch.{name}":
            return name
    raise UserError(f"no GGUF holds {dtype}: say --dtype float32, float16 or bfloat16")


def export_gguf(
    model: PreTrainedModel,
    out: Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    layout: Layout = "uniform",
    kind: GgufType | None = None,
    overwrite: bool = False,
    provenance: Mapping[str, Any] | None = None,
    tell: Tell = ignore_line,
) -> tuple[Costs, GgufCheck]:
    """Write a statically pruned (or dense) model as a folder with ``model.gguf``, and prove that the file holds it.

    Matrices become ``kind``, or stay in the model's dtype; vectors are float32. The folder appears whole or not at all.

    Raises:
        UserError: llama.cpp cannot hold it, a package or disk space is missing, ``out`` is taken, or a tensor came back
            different. Nothing is left behind.
    """
    check_packages("GGUF", "gguf", "gguf")
    check_free(out, overwrite)
    check_family(model.config, layout)
    check_biases(model)
    target = target_for(layout, model)
    plan, chosen = plan_for(model, target), kind or gguf_type_of(model.dtype)
    fields = tokenizer_fields(tokenizer, model.config.vocab_size)
    types = {one.name: _type_of(one, chosen) for one in plan.tensors}
    costs, pruning = costs_of(model, target), pruning_record(model)
    check_space(out, costs.bytes)
    given = dict(provenance or {})
    base = {"name": given.pop("base_model", "a model in memory"), "model_type": model.config.model_type}
    with appearing(out, overwrite) as folder:
        tell("writing the tensors")
        _write(folder / FILE, plan, fields, types, chosen, base["name"])
        tell("reading the file again and comparing it with the model")
        check = _read_again(folder / FILE, plan, types)
        written = {"layout": layout, "architecture": plan.architecture, "type": chosen, "check": vars(check)}
        write_record(folder, {"base_model": base, "pruning": pruning, "written": written, **given})
        gguf_card(folder, base, pruning, costs, written)
    return costs, check


def _type_of(tensor: GgufTensor, chosen: GgufType) -> GgufType:
    if len(tensor.shape) == 1:
        return "float32"
    return "float16" if chosen == "q8_0" and tensor.shape[-1] % _BLOCK else chosen


def _write(
    path: Path, plan: GgufPlan, tokenizer: Mapping[str, Any], types: Mapping[str, GgufType], chosen: GgufType, base: str
) -> None:
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, quants

    writer = GGUFWriter(path, plan.architecture)
    writer.add_type("model")
    writer.add_name(f"{base} pruned")
    writer.add_tags(["pruned", "structured-pruning"])
    writer.add_file_type(_FILE_TYPES[chosen])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    adders = {bool: "bool", str: "string", int: "uint32", float: "float32", list: "array"}
    for start, fields in ((plan.architecture, plan.fields), ("tokenizer", tokenizer)):
        for key, value in fields.items():
            getattr(writer, f"add_{adders[type(value)]}")(f"{start}.{key}", value)
    for one in plan.tensors:
        kind = GGMLQuantizationType[_TENSOR_TYPES[types[one.name]]]
        numbers, size = GGML_QUANT_SIZES[kind]
        count = math.prod(one.shape) // numbers * size
        writer.add_tensor_info(one.name, one.shape, np.dtype(np.float32), count, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for one in plan.tensors:
        kind = GGMLQuantizationType[_TENSOR_TYPES[types[one.name]]]
        writer.write_tensor_data(quants.quantize(one.make().float().numpy(), kind))
    writer.close()


def _read_again(path: Path, plan: GgufPlan, types: Mapping[str, GgufType]) -> GgufCheck:
    """Compare every tensor of the file with what it was made from."""
    from gguf import GGUFReader, quants

    found = {one.name: one for one in GGUFReader(path).tensors}
    wanted = {one.name: one for one in plan.tensors}
    if found.keys() != wanted.keys():
        names = sorted(found.keys() ^ wanted.keys())[:3]
        raise UserError(f"the export failed its check: tensors missing or left over in the file: {names}")
    worst = 0.0
    for name, one in wanted.items():
        tensor = one.make().float()
        read = torch.tensor(quants.dequantize(found[name].data, found[name].tensor_type)).reshape(tensor.shape)
        largest = float(tensor.abs().max())
        difference = float((tensor - read).abs().max()) / (largest or 1.0)
        if not difference <= _ROUNDING[types[name]]:  # NaN too
            raise UserError(
                f"the export failed its check: {name} came back different, by {difference:.2g} of {largest:.2g}"
            )
        worst = max(worst, difference)
    mixed = "q8_0" in types.values()
    wider = tuple(name for name in wanted if mixed and types[name] == "float16")
    return GgufCheck(plan.architecture, len(wanted), path.stat().st_size, worst, wider)
