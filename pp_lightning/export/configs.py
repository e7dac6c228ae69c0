"""What stands beside weights or a graph: configs and a tokenizer, as older transformers and other engines read them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def write_configs(
    folder: Path, config: Mapping[str, Any], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Write ``config.json`` with the model's dtype, its ``generation_config.json`` and the tokenizer."""
    write_json(folder / "config.json", {**config, "dtype": str(model.dtype).removeprefix("torch.")})
    if model.generation_config is not None:
        model.generation_config.to_json_file(folder / "generation_config.json")
    if tokenizer is not None:
        _write_tokenizer(tokenizer, folder)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write it for people too, keys in order."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save it; the class of a plain ``tokenizer.json`` is called as transformers 4 calls it."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if content.get("tokenizer_class") == "TokenizersBackend":
        write_json(path, content | {"tokenizer_class": "PreTrainedTokenizerFast"})
