"""Which format and layout an engine was seen to load, and what that costs: asked before any work."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedConfig

from pp_lightning.errors import UserError
from pp_lightning.export.engines.run import Engine
from pp_lightning.export.gguf_plan import LLAMA_LIKE, check_family
from pp_lightning.export.layouts import Layout

Format = Literal["safetensors", "gguf", "onnx", "pt2", "compiled"]
FORMATS: Mapping[Engine, Format] = {
    "llama.cpp": "gguf",
    "vllm": "safetensors",
    "openvino": "onnx",
    "onnxruntime-genai": "onnx",
    "transformers": "safetensors",
    "lm-eval": "safetensors",
}


@dataclass(frozen=True)
class Choice:
    """What to write for an engine."""

    format: Format
    layout: Layout | None
    told: str


def choice_for(
    engine: Engine, config: PreTrainedConfig, *, own_counts: bool, format: Format | None, layout: Layout | None
) -> Choice:
    """What an engine loads of a model.

    ``own_counts`` says whether layers are going to differ in their numbers of units unless they are told not to.
    ``format`` and ``layout`` are what the user asked for; None leaves them open.
    """
    written = FORMATS[engine]
    if format not in (None, written):
        raise UserError(f"{engine} loads {written}: leave --format out, or --for")
    if written == "onnx":
        return Choice(written, None, "any counts as they are; keys and values go in and out")
    if layout is None:
        layout = "per-layer" if own_counts and _holds_own_counts(engine, config) else "uniform"
    if engine == "llama.cpp":
        check_family(config, layout)
        told = "its architecture deci, every layer with counts of its own, nothing padded"
        return Choice(written, layout, told if layout == "per-layer" else "the same counts in every layer")
    return Choice(written, layout, _TOLD[engine, layout])


_TOLD: Mapping[tuple[Engine, Layout], str] = {
    ("vllm", "per-layer"): "runs in vLLM's Transformers backend with --trust-remote-code, not in its own classes",
    ("vllm", "uniform"): "a stock class; seed_oss with biases of outputs, and qwen2, need --model-impl transformers",
    ("vllm", "padded"): "a stock class, filled with zeros to the widest layer",
    ("lm-eval", "per-layer"): "needs trust_remote_code=True in --model_args",
    ("lm-eval", "uniform"): "a stock class, no code of ours",
    ("lm-eval", "padded"): "a stock class, filled with zeros to the widest layer",
    ("transformers", "per-layer"): "needs trust_remote_code=True; versions 4.57 to 5.24 were seen to load it",
    ("transformers", "uniform"): "a stock class, no code of ours",
    ("transformers", "padded"): "a stock class, filled with zeros to the widest layer",
}


def _holds_own_counts(engine: Engine, config: PreTrainedConfig) -> bool:
    return engine != "llama.cpp" or config.model_type in LLAMA_LIKE
