"""What can be wrong with a checkpoint folder, in our words: transformers' own are long, or a bare ``KeyError``."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pp_lightning.errors import UserError
from pp_lightning.files import is_file, read_json

_INDEX = "model.safetensors.index.json"
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
# What the errors of transformers, tokenizers, safetensors and the hub's client say, and what it means.
_MEANINGS = (
    (r"ignore_mismatched_sizes|size mismatch", "its weights have other sizes than config.json names"),
    (r"model type `(.*?)`", "transformers knows no model type {0!r}; a newer version may"),
    (r"Should have a `model_type` key", "config.json names no model_type"),
    (
        r"trust_remote_code|custom code",
        "it brings code of its own, which is never run: use a type that transformers knows",
    ),
    (r"SafetensorError", "its weights are damaged or cut off: copy them again"),
    (
        r"backend tokenizer|PyPreTokenizer|sentencepiece|tiktoken",
        "it has no tokenizer.json: copy the tokenizer's files there",
    ),
    (r"JSONDecodeError|ModelWrapper|Tokenizer\b.*Error|interpreted as an integer", "its tokenizer.json is damaged"),
    (r"Field '(\w+)' expected (\w+), got", "config.json: {0} must be {1}"),
    (r"(hidden size \(.*?\) is not a multiple of the number of attention heads \(.*?\))", "config.json: the {0}"),
    (r"Unrecognized configuration class .*?\.(\w+)Config", "{0} is no causal language model"),
    (r"offline|couldn't connect|Connection|MaxRetry", "it is no folder here, and the hub cannot be reached"),
    (r"is not a local folder|Repository Not Found|401 Client|404 Client", "it is no folder here, and not on the hub"),
    (r"out of memory|can't allocate", "it does not fit into memory"),
)


def check_folder(path: str, *, allow_pickle: bool, bundled_code: bool = False) -> dict[str, Any]:
    """Refuse a folder whose config, weights or index cannot be read."""
    folder = Path(path)
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'} holds no settings of a model: give a transformers checkpoint folder")
    if not bundled_code and "modeling_pruned" in str(config.get("auto_map")):
        raise UserError(
            f"{path} has counts of its own in every layer, which transformers alone loads (trust_remote_code=True): "
            "write it with --layout uniform"
        )
    for name in _SIZES:
        if isinstance(config.get(name), int) and config[name] < 1:
            raise UserError(f"{folder / 'config.json'}: {name} must be at least 1, not {config[name]}")
    pickled = is_file(folder / "pytorch_model.bin") or is_file(folder / "pytorch_model.bin.index.json")
    if is_file(folder / _INDEX):
        _check_index(folder)
    elif not is_file(folder / "model.safetensors") and not (pickled and allow_pickle):
        if pickled:
            raise UserError(
                f"{path} has pytorch_model.bin only, which can run code: convert it to safetensors, or trust it with "
                "--model.allow_pickle true"
            )
        raise UserError(f"{path} has no weights: put model.safetensors there")
    return config


def in_our_words(error: Exception, config: Mapping[str, Any]) -> str:
    """What an error of another package means: one clause."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, KeyError):
        named = _setting_of(str(error.args[0]), config)
        if named:
            return f"config.json: {named} is {error.args[0]!r}, which transformers does not know"
        return f"transformers does not know {error.args[0]!r}"
    for pattern, meaning in _MEANINGS:
        if found := re.search(pattern, text, re.DOTALL):
            return meaning.format(*found.groups())
    lines = str(error).strip().splitlines()
    return (
        lines[0]
        if lines and isinstance(error, OSError | ValueError | ImportError)
        else "config.json does not describe a model"
    )


def _check_index(folder: Path) -> None:
    index = read_json(folder / _INDEX)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names:
        raise UserError(f"{folder / _INDEX} has no weight_map: copy the index again")
    missing = sorted({str(name) for name in names.values() if not is_file(folder / str(name))})
    if missing:
        raise UserError(f"{folder} lacks {missing[0]}, which {_INDEX} names: copy it there")


def _setting_of(value: str, config: Mapping[str, Any]) -> str | None:
    """The name under which a config holds a value, wherever in it."""
    for name, one in config.items():
        if one == value:
            return name
        if isinstance(one, Mapping) and (inner := _setting_of(value, one)):
            return f"{name}.{inner}"
    return None
