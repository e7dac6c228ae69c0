"""Run a GGUF in llama.cpp, from xllamacpp or llama-cpp-python: see :mod:`pp_lightning.export.engines.run`.

It calls llama.cpp's C interface, which both packages bring along. Of its parameter structures it uses what stands at
their beginning and hands them back as they came.
"""

import ctypes
import math
import os
import struct
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any


class _Parameters(ctypes.Structure):
    """More room than any of the parameter structures needs; a context's begins with these."""

    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max")),
        ("rest", ctypes.c_byte * 2048),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


def _library() -> tuple[Any, str]:
    for package, pattern in (("xllamacpp", "xllamacpp*.so"), ("llama_cpp", "lib/libllama.so")):
        spec = find_spec(package)
        if spec is not None and spec.origin is not None:
            __import__(package)
            [path, *_] = Path(spec.origin).parent.glob(pattern)
            return ctypes.CDLL(str(path)), f"{package} {version(package.replace('llama_cpp', 'llama-cpp-python'))}"
    raise ImportError("neither xllamacpp nor llama_cpp is installed")


class Runtime:
    """A loaded model."""

    def __init__(self, path: str, context: int) -> None:
        self._library, self.version = _library()
        c = self._library
        for name in ("llama_model_default_params", "llama_context_default_params"):
            getattr(c, name).restype = _Parameters
        for name in (
            "llama_model_load_from_file",
            "llama_init_from_model",
            "llama_model_get_vocab",
            "llama_get_memory",
        ):
            getattr(c, name).restype = ctypes.c_void_p
        c.llama_batch_init.restype = _Batch
        c.llama_get_logits_ith.restype = ctypes.POINTER(ctypes.c_float)
        self._quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(_say_errors)
        c.llama_log_set(self._quiet, None)
        c.llama_backend_init()
        self._model = c.llama_model_load_from_file(path.encode(), c.llama_model_default_params())
        if not self._model:
            raise ValueError(f"llama.cpp ({self.version}) cannot load {path}")
        parameters = c.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = context
        _in_full_precision(parameters)
        self._context = c.llama_init_from_model(ctypes.c_void_p(self._model), parameters)
        threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)  # more would wait for each other
        c.llama_set_n_threads(ctypes.c_void_p(self._context), threads, threads)
        self._words = c.llama_vocab_n_tokens(ctypes.c_void_p(c.llama_model_get_vocab(ctypes.c_void_p(self._model))))
        self._batch, self._held = c.llama_batch_init(context, 0, 1), 0

    def forget(self) -> None:
        """Begin a new text."""
        memory = self._library.llama_get_memory(ctypes.c_void_p(self._context))
        self._library.llama_memory_clear(ctypes.c_void_p(memory), ctypes.c_bool(True))
        self._held = 0

    def logits(self, ids: list[int]) -> list[Any]:
        """Go on with these tokens; one array of V numbers for each, valid until the next call."""
        batch = self._batch
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index], batch.pos[index], batch.n_seq_id[index] = token, self._held + index, 1
            batch.seq_id[index][0], batch.logits[index] = 0, 1
        if self._library.llama_decode(ctypes.c_void_p(self._context), batch):
            raise ValueError("llama.cpp could not run the batch")
        self._held += len(ids)
        found = (self._library.llama_get_logits_ith(ctypes.c_void_p(self._context), i) for i in range(len(ids)))
        return [(ctypes.c_float * self._words).from_address(ctypes.addressof(row.contents)) for row in found]

    def tokens_of(self, text: str) -> list[int]:
        """What its own tokenizer makes of a text."""
        vocabulary = ctypes.c_void_p(self._library.llama_model_get_vocab(ctypes.c_void_p(self._model)))
        data, room = text.encode(), len(text.encode()) + 16
        found = (ctypes.c_int32 * room)()
        flags = (ctypes.c_bool(True), ctypes.c_bool(True))
        number = self._library.llama_tokenize(vocabulary, data, len(data), found, room, *flags)
        return list(found[:number])


def _in_full_precision(parameters: _Parameters) -> None:
    """As ``-fa off -ctk f32 -ctv f32``: no flash attention, keys and values in float32, as transformers computes.

    Both stand further back in the structure, so they are found by what is around them: four types that are -1 before
    six numbers of rotary positions, and two types that are 1 (float16) between two pairs of null pointers.
    """
    start, content = ctypes.addressof(parameters), bytes(parameters)
    automatic = struct.pack("=4i6f", -1, -1, -1, -1, 0, 0, -1, -1, -1, -1)
    place = content.find(automatic)
    if place > 0:
        ctypes.memset(start + place + 12, 0, 4)
    place = content.find(bytes(16) + struct.pack("=2i", 1, 1) + bytes(16))
    if place > 0 and place % 8 == 0:
        ctypes.memset(start + place + 16, 0, 8)


def _say_errors(level: int, text: bytes, _: Any) -> None:
    if level == 4:
        sys.stderr.write(text.decode(errors="replace"))


def _log_likelihood(row: Any, token: int) -> float:
    try:
        import numpy as np

        numbers = np.frombuffer(row, dtype=np.float32).astype(np.float64)
        top = numbers.max()
        return float(numbers[token] - top - np.log(np.exp(numbers - top).sum()))
    except ImportError:
        top = max(row)
        return row[token] - top - math.log(sum(math.exp(number - top) for number in row))


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Tokens, losses and the version, as asked."""
    longest = max([len(p) + request["steps"] for p in request["prompts"]] + [len(w) for w in request["windows"]])
    runtime = Runtime(f"{request['folder']}/{request.get('file', 'model.gguf')}", longest)
    tokens = []
    for prompt in request["prompts"]:
        runtime.forget()
        found, given = [], prompt
        for _ in range(request["steps"]):
            row = runtime.logits(given)[-1]
            found.append(max(range(len(row)), key=row.__getitem__))
            given = found[-1:]
        tokens.append(found)
    losses = []
    for window in request["windows"]:
        runtime.forget()
        rows = runtime.logits(window)
        losses.append(-sum(_log_likelihood(row, token) for row, token in zip(rows, window[1:], strict=False)))
    texts = [runtime.tokens_of(text) for text in request.get("texts", [])]
    return {"version": runtime.version, "tokens": tokens, "losses": losses, "texts": texts}
