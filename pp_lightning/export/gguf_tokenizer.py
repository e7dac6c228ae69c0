"""A tokenizer of transformers as the fields that llama.cpp reads: byte-level BPE, and BPE that falls back to bytes."""

import json
import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from pp_lightning.errors import UserError

# llama.cpp's names (gguf.TokenType) for what a token is.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

_SPECIAL = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "unk_token_id": "unknown_token_id",
    "sep_token_id": "seperator_token_id",  # llama.cpp spells it so
    "pad_token_id": "padding_token_id",
    "mask_token_id": "mask_token_id",
}

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Patterns that split a text before the merges, and llama.cpp's names for them.
_SPLITS = {rf"{_LETTERS}\p{{N}}{{1,3}}{_REST}": "llama-bpe", rf"{_LETTERS}\p{{N}}{_REST}": "qwen2"}


def tokenizer_fields(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> dict[str, Any]:
    """Fields ``tokenizer.*`` of a GGUF.

    Ids up to ``vocabulary`` that the tokenizer does not have are filled up as unused.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError("a GGUF needs a tokenizer with tokenizer.json: use --format safetensors")
    content = json.loads(backend.to_str())
    kind, split = _kind(content)
    texts, types = _tokens(tokenizer, content, vocabulary, plain=kind == "llama")
    fields: dict[str, Any] = {"ggml.model": kind, "ggml.pre": split, "ggml.tokens": texts, "ggml.token_type": types}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]]
    if kind == "gpt2":
        fields["ggml.merges"] = merges
    else:
        fields["ggml.scores"] = _scores(merges, texts)
    return fields | _specials(tokenizer) | {"ggml.add_space_prefix": _puts_a_space_in_front(content)}


def _kind(content: Mapping[str, Any]) -> tuple[str, str]:
    """llama.cpp's name of the tokenizer, and of how it splits texts."""
    model = content["model"]
    if model["type"] == "BPE" and model.get("byte_fallback"):
        return "llama", "default"
    steps = _steps(content["pre_tokenizer"], "pretokenizers")
    if model["type"] == "BPE" and steps and steps[-1]["type"] == "ByteLevel":
        *before, last = steps
        if not before and last.get("use_regex", True):
            return "gpt2", "gpt-2"
        if [step["type"] for step in before] == ["Split"]:
            split = _SPLITS.get(before[0]["pattern"].get("Regex", ""))
            if split is not None:
                return "gpt2", split
        if [step["type"] for step in before] == ["Digits"] and before[0]["individual_digits"]:
            return "gpt2", "smollm"
    raise UserError(
        "llama.cpp has no tokenizer known to do what this one does (byte-level BPE split as GPT-2, LLaMA 3, Qwen 2 or "
        "SmolLM do, or BPE that falls back to bytes): use --format safetensors or onnx"
    )


def _tokens(
    tokenizer: PreTrainedTokenizerBase, content: Mapping[str, Any], vocabulary: int, *, plain: bool
) -> tuple[list[str], list[int]]:
    """Text and type of every id; spaces of added tokens are written as spaces."""
    by_id = {number: text for text, number in tokenizer.get_vocab().items()}
    if max(by_id) >= vocabulary:
        raise UserError(f"the tokenizer has ids up to {max(by_id)}, the model {vocabulary} rows: check the checkpoint")
    added = {one["id"]: one for one in content["added_tokens"]}
    texts, types = [], []
    for number in range(vocabulary):
        text, kind = by_id.get(number, f"[PAD{number}]"), _NORMAL
        if number not in by_id:
            kind = _UNUSED
        elif plain and re.fullmatch(r"<0x[0-9A-F]{2}>", text):
            kind = _BYTE
        elif number in added:
            kind = _CONTROL if added[number]["special"] else _USER_DEFINED
            text = text if kind == _CONTROL else text.replace("▁", " ")
        if plain and number == tokenizer.unk_token_id:
            kind = _UNKNOWN
        texts.append(text)
        types.append(kind)
    return texts, types


def _scores(merges: list[str], texts: list[str]) -> list[float]:
    """The earlier a merge, the higher: llama.cpp merges by scores what BPE merges by rank."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), number)
    return [-float(rank.get(text, len(merges))) for text in texts]


def _specials(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    found: dict[str, Any] = {
        f"ggml.{theirs}": number
        for ours, theirs in _SPECIAL.items()
        if (number := getattr(tokenizer, ours, None)) is not None
    }
    text = tokenizer("a")["input_ids"]
    found["ggml.add_bos_token"] = tokenizer.bos_token_id is not None and text[0] == tokenizer.bos_token_id
    found["ggml.add_eos_token"] = tokenizer.eos_token_id is not None and text[-1] == tokenizer.eos_token_id
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several, by name
        template = template.get("default")
    return found | ({} if not template else {"chat_template": template})


def _puts_a_space_in_front(content: Mapping[str, Any]) -> bool:
    steps = _steps(content["normalizer"], "normalizers") + _steps(content["pre_tokenizer"], "pretokenizers")
    return any(
        step["type"] == "Prepend" or step.get("add_prefix_space") or step.get("prepend_scheme") in ("first", "always")
        for step in steps
    )


def _steps(step: Mapping[str, Any] | None, several: str) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    return list(step[several]) if step["type"] == "Sequence" else [step]
