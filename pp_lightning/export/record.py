"""What an export says about itself: ``pruning.json`` for machines, a model card for people."""

import json
import platform
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from pp_lightning.calibration_data import CalibrationData
from pp_lightning.export.costs import Costs, in_words
from pp_lightning.export.folder import RECORD
from pp_lightning.export.graph import Graph
from pp_lightning.export.verify import Agreement
from pp_lightning.pruning import is_pruned, pruning_of
from pp_lightning.statistics import Statistics

FORMAT = "pp-lightning export 1"
PACKAGES = ("torch", "transformers", "safetensors", "pp-lightning")


def pruning_record(model: PreTrainedModel) -> dict[str, Any]:
    """Method, ratios and kept units of a pruned model; empty for one that is not."""
    if not is_pruned(model):
        return {}
    pruning = pruning_of(model)
    kept = {
        str(layer): {
            block.block.value: pruning.choices[layer, block.block].tolist()
            for block in pruning.plan.blocks
            if (layer, block.block) in pruning.choices
        }
        for layer in pruning.plan.layers
    }
    return {
        "method": pruning.method.label,
        "settings": pruning.method.settings(),
        "attention_unit": pruning.plan.unit.value,
        "ratio_in_pruned_layers": {block.block.value: block.ratio for block in pruning.plan.blocks},
        "kept": kept,
        "updated": {f"{layer}.{block.value}": vars(done) for (layer, block), done in pruning.updated.items()},
    }


def calibration_record(calibration_data: CalibrationData) -> dict[str, Any]:
    """What tells one calibration from another."""
    record: dict[str, Any] = {"calibration_data": calibration_data.called, "model": calibration_data.model}
    if isinstance(calibration_data, Statistics):
        record |= {
            "batches": calibration_data.num_batches,
            "batches_digest": calibration_data.batches_digest,
            "positions": calibration_data.num_positions,
        }
    return record


def graph_record(graph: Graph, runs_in: str) -> dict[str, Any]:
    """How a graph is called."""
    return {
        "inputs": list(graph.inputs),
        "outputs": list(graph.outputs),
        "key_value_heads": list(graph.caches),
        "head_size": graph.head_size,
        "runs_in": runs_in,
    }


def base_model_name(path: str | None) -> str:
    """How the base model is called in public: a hub id, or the last part of a folder's path."""
    if path is None:
        return "the model that comes with pp-lightning"
    return Path(path).resolve().name if Path(path).exists() else path


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write ``pruning.json``."""
    versions = {package: version(package) for package in PACKAGES} | {"python": platform.python_version()}
    content = {"format": FORMAT, **record, "versions": versions}
    text = json.dumps(content, indent=2, default=str)
    in_one_line = re.sub(r"\[[\d\s,]+\]", lambda numbers: " ".join(numbers[0].split()), text)  # kept units: thousands
    (folder / RECORD).write_text(in_one_line + "\n", encoding="utf-8")


def write_card(
    folder: Path, base: Mapping[str, Any], pruning: Mapping[str, Any], costs: Costs, check: Agreement
) -> None:
    """Write the model card."""
    trust = ", trust_remote_code=True" if costs.layout == "per-layer" else ""
    written = f"written as `{costs.model_class}`, which computes exactly what the pruned model computes"
    text = f"""{_header(base, pruning, "transformers", "pruned", written)}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("."{trust})
tokenizer = AutoTokenizer.from_pretrained("."{trust})
```
```bash
vllm serve . {_vllm(costs)}
lm_eval --model hf --model_args pretrained=.{trust.replace(", ", ",")} --tasks hellaswag
```

| | |
|---|---|
{_sizes(costs)}
| loads in | {costs.loads_in} |
| checked | reloaded after writing by transformers {version("transformers")}: logits differ by at most \
{check.largest_difference:.1e}, greedy tokens equal |
{_int8_row(check)}
`pruning.json` has the settings, the kept units of every layer, the calibration's digest and all versions.
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def gguf_card(
    folder: Path, base: Mapping[str, Any], pruning: Mapping[str, Any], costs: Costs, written: Mapping[str, Any]
) -> None:
    """Write the model card of a GGUF."""
    check = written["check"]
    told = f"for llama.cpp as its architecture `{written['architecture']}`"
    text = f"""{_header(base, pruning, "llama.cpp", "gguf, pruned", told)}
```bash
llama-cli -m model.gguf -p "Once upon a time"
llama-quantize model.gguf model-q4_k_m.gguf Q4_K_M     # rows that are no multiple of 256 fall back to q5_0 or q8_0
```
```python
from llama_cpp import Llama  # pip install llama-cpp-python

Llama("model.gguf")("Once upon a time", max_tokens=32)
```

| | |
|---|---|
| type of the matrices | {written["type"]} |
{_sizes(costs)}
| checked | {check["tensors"]} tensors read again: differ by at most {check["largest_difference"]:.1e} of the largest |

`pruning.json` has the settings, the kept units of every layer, the calibration's digest and all versions.
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def _header(base: Mapping[str, Any], pruning: Mapping[str, Any], library: str, tags: str, told: str) -> str:
    return f"""---
library_name: {library}
base_model: {base["name"]}
tags: [{tags}, structured-pruning, pp-lightning]
---
# {base["name"]}, pruned

`{base["name"]}` ({base["model_type"]}), pruned by **{pruning.get("method", "none")}** with
[pp-lightning](https://pypi.org/project/pp-lightning/), {told}; the weights come from a
`{base["model_type"]}` model and keep its licence.
"""


def _int8_row(check: Agreement) -> str:
    found = check.int8
    if found is None:
        return ""
    return (
        f"| int8 | {found.matrices} matrices by torchao {version('torchao')}, which loading needs: the next token's "
        f"distribution is {found.divergence:.1e} nats from the unquantised one, {found.same_tokens} of "
        f"{found.of_tokens} greedy tokens equal |\n"
    )


def _vllm(costs: Costs) -> str:
    """Options that vLLM was seen to need for a class."""
    if costs.layout == "per-layer":
        return "--trust-remote-code"
    computes_head_sizes = costs.model_class in ("SeedOssForCausalLM", "Qwen2ForCausalLM")
    return "--model-impl transformers" if computes_head_sizes else ""


def _sizes(costs: Costs) -> str:
    """Rows of a card's table that every layout and format has."""
    heads, key_heads, channels = (in_words(counts) for counts in (costs.heads, costs.key_heads, costs.channels))
    return f"""| layout | {costs.layout} |
| heads in a layer | {heads} |
| key/value heads in a layer | {key_heads} |
| MLP channels in a layer | {channels} |
| parameters | {costs.parameters:,} ({costs.parameters_ratio:.1%} of the dense model) |
| FLOPs | {costs.flops_ratio:.1%} of the dense model |"""
