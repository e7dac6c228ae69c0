"""Files of safetensors, written one tensor at a time: the package's own writer wants all of a file in memory."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pp_lightning.interfaces import give_memory_back

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
_MUCH = 1 << 22  # bytes that are worth giving back
SIZES = {name: dtype.itemsize for dtype, name in NAMES.items()}  # bytes of a number


@dataclass(frozen=True)
class Placeholder:
    """A tensor that is going to be written."""

    like: Tensor
    make: Callable[[], Tensor]


def write_tensors(tensors: Mapping[str, Placeholder], file: Path, metadata: Mapping[str, str]) -> None:
    """Write a file as safetensors' own writer does: wide types first, then by name."""
    names = sorted(tensors, key=lambda name: (-tensors[name].like.element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name in names:
        like = tensors[name].like
        end = start + like.numel() * like.element_size()
        header[name] = {"dtype": NAMES[like.dtype], "shape": list(like.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = tensors[name].make().cpu().contiguous()
            opened.write(tensor.flatten().view(torch.uint8).numpy().data)
            if tensor.nbytes > _MUCH:
                del tensor
                give_memory_back()
