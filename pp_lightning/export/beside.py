"""What stands beside a graph, so that engines and people know what it is: configs, a tokenizer and a README."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pp_lightning.export.configs import write_configs, write_json
from pp_lightning.export.graph import Graph
from pp_lightning.export.layouts import config_content
from pp_lightning.export.verify import Agreement
from pp_lightning.families import longest_text

_GENAI_TYPE = "decoder"  # of ONNX Runtime GenAI: any graph with this calling convention


def write_beside(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, graph: Graph, form: str
) -> None:
    """Write ``config.json``, ``generation_config.json``, the tokenizer, and for ONNX ``genai_config.json``.

    The config is that of the model before pruning; the graph's own sizes stand in ``pruning.json``.
    """
    write_configs(folder, config_content(model.config), model, tokenizer)
    if form == "onnx" and graph.caches:
        write_json(folder / "genai_config.json", genai_config(model, tokenizer, graph))


def genai_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, graph: Graph) -> dict[str, Any]:
    """How ONNX Runtime GenAI calls a graph with a cache. Key/value heads of each layer it reads off the graph."""
    ends = _first(getattr(model.generation_config, "eos_token_id", None), model.config.eos_token_id)
    last = ends[-1] if isinstance(ends, list) else ends
    own = None if tokenizer is None else tokenizer.pad_token_id
    context = longest_text(model.config)
    return {
        "model": {
            "type": _GENAI_TYPE,
            "bos_token_id": _first(model.config.bos_token_id, last, 0),
            "eos_token_id": _first(ends, 0),
            "pad_token_id": _first(own, model.config.pad_token_id, last, 0),
            "context_length": context,
            "vocab_size": model.config.vocab_size,
            "decoder": {
                "filename": "model.onnx",
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "head_size": graph.head_size,
                "hidden_size": model.config.hidden_size,
                "num_attention_heads": model.config.num_attention_heads,
                "num_key_value_heads": max(graph.caches),
                "num_hidden_layers": len(graph.caches),
                "inputs": {
                    **{name: name for name in graph.inputs[: graph.leading]},
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"do_sample": False, "max_length": context, "past_present_share_buffer": False},
    }


def graph_card(folder: Path, record: Mapping[str, Any], graph: Graph, form: str, check: Agreement) -> None:
    """Write the README: how the graph is called, and lines that do it."""
    base, method = record.get("base_model", "a model in memory"), record.get("pruning", {}).get("method", "none")
    cached, dynamic = bool(graph.caches), "batch" in record
    told = "one batch of a fixed size; feed every `new_*` output back" if dynamic else "batch, text and cache are open"
    example = "" if dynamic else _example(form, graph)
    lines = [
        *("---", f"base_model: {base}", f"tags: [{form}, pruned, structured-pruning, pp-lightning]", "---"),
        f"# {base}, pruned, as a graph",
        "",
        f"`{base}`, pruned by **{method}** with [pp-lightning](https://pypi.org/project/pp-lightning/); the weights "
        "keep its licence.",
        "",
        "| | |",
        "|---|---|",
        "| `input_ids` | (batch, sequence) int64 |",
        f"| `attention_mask` | (batch, {'past + ' * cached}sequence) int64, 0 at padding |",
        *(["| `position_ids` | (batch, sequence) int64 |"] if "position_ids" in graph.inputs else []),
        *(
            [
                f"| `past_key_values.i.key`, `.value` | (batch, heads of layer i, past, {graph.head_size}), past is 0 "
                f"at the start; heads: {list(graph.caches)} |",
                "| out: `present.i.key`, `.value` | the same, past + sequence long: the next call's past |",
            ]
            if cached
            else []
        ),
        "| out: `logits` | (batch, sequence, vocabulary) |",
        f"| sizes | {told} |",
        f"| checked | in its runtime: logits differ by at most {check.largest_difference:.1e} |",
        "",
        example,
        "`pruning.json` has all names of inputs and outputs, the settings, the kept units and all versions.",
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _example(form: str, graph: Graph) -> str:
    rows = f'f"past_key_values.{{i}}.{{part}}": np.zeros((1, heads, 0, {graph.head_size}), np.float32)'
    if form == "onnx":
        caches = f"""
heads_of = {list(graph.caches)}
inputs |= {{{rows} for i, heads in enumerate(heads_of) for part in ("key", "value")}}""" * bool(graph.caches)
        genai = """
```python
import onnxruntime_genai as og  # pip install onnxruntime-genai

model = og.Model(".")
tokenizer, parameters = og.Tokenizer(model), og.GeneratorParams(model)
parameters.set_search_options(max_length=32)
generator = og.Generator(model, parameters)
generator.append_tokens(tokenizer.encode("Once upon a time"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
```
"""
        return f"""```python
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
ids = np.array([[1, 2, 3]])
inputs = {{"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(3)[None]}}{caches}
known = {{one.name for one in session.get_inputs()}}
logits, *cache = session.run(None, {{name: array for name, array in inputs.items() if name in known}})
```
OpenVINO reads the file as it stands: `openvino.Core().compile_model("model.onnx", "CPU")`.
{genai * bool(graph.caches)}"""
    load = (
        'torch._inductor.aoti_load_package("model.compiled.pt2")'
        if form == "compiled"
        else 'torch.export.load("model.pt2").module()'
    )
    past = f"[torch.zeros(1, heads, 0, {graph.head_size}) for heads in {list(graph.caches)} for _ in range(2)]"
    return f"""```python
import torch

program = {load}
ids = torch.tensor([[1, 2, 3]])
past = {past if graph.caches else "[]"}
with torch.no_grad():
    logits, *cache = program(ids, torch.ones_like(ids), torch.arange(3)[None], past)
```
"""


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
