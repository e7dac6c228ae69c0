"""A few rows of each task in the original formats, made up for the tests, and tiny models to score them."""

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PreTrainedModel

from pp_lightning.commonsense import CommonsenseData
from tests.commonsense.tokenizers import VOCABULARY, tokenizer_of
from tests.replicas import replicas


def _arc(number: int, texts: list[str], answer: str, labels: str = "ABCDE") -> dict[str, Any]:
    choices = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=False)]
    return {
        "id": f"Made_{number}",
        "question": {"stem": f"What is case {number}?", "choices": choices},
        "answerKey": answer,
    }


ROWS: dict[str, list[dict[str, Any]]] = {
    "boolq": [
        {"question": "is the cage clean", "answer": False, "passage": "A guinea pig lives in the cage. " * 6},
        {"question": "is it a roof", "answer": True, "passage": "It is a roof."},
        {"question": "does it burn", "label": 1, "passage": "Ethanol burns, as plants do."},
    ],
    "piqa": [
        {"goal": "clean a cage", "sol1": "use water", "sol2": "use a much larger amount of ethanol "},
        {"goal": "dresser", "sol1": "replace drawer with bobby pin", "sol2": "finish with  bobby pin"},
        {"goal": "sit on a roof.", "sol1": "Sit.", "sol2": "Burn."},
    ],
    "hellaswag": [
        {
            "activity_label": "Roofing",
            "ctx_a": "A man is sitting on a roof.",
            "ctx_b": "he",
            "endings": ["pulls up roofing.", "is a surgeon.", "rotates [ten times] quickly.", "burns [title] it  all."],
            "label": 3,
        },
        {
            "activity_label": "Cleaning",
            "ctx_a": " [header] How to clean [title] Take water. ",
            "ctx_b": "",
            "endings": ["Then clean.", "Then sit.", "Then burn it.", "Stop."],
            "label": "0",
        },
    ],
    "winogrande": [
        {"sentence": "Sarah saw Maria so _ ran.", "option1": "Sarah", "option2": "Maria", "answer": "2"},
        {"sentence": "_ is better than the cage.", "option1": "The roof", "option2": "Water", "answer": "1"},
        {
            "sentence": "The roof fits the cage as the _  is small.",
            "option1": "roof ",
            "option2": "cage",
            "answer": "1",
        },
    ],
    "arc_easy": [
        _arc(1, ["plants", "sunlight", "the surgeon", "energy balance"], "B"),
        _arc(2, ["plants", "sunlight", "a cage"], "3", labels="12345"),
        _arc(3, ["one", "two", "three", "four", "five units of energy"], "E"),
    ],
    "arc_challenge": [
        _arc(4, ["days become shorter", "days become longer", "no effect", "yes"], "A"),
        _arc(5, ["no", "yes", "yes and no"], "C"),
    ],
    "openbookqa": [
        {**_arc(6, ["lions", "humans", "bunnies", "grass"], "C"), "id": "8-343"},
        {**_arc(7, ["a marsh", "a tundra", "the plains", "a desert"], "A"), "id": "1129"},
    ],
}
PIQA_LABELS = [1, 0, 0]
FILES = {
    "boolq": "validation.jsonl",
    "piqa": "valid.jsonl",
    "hellaswag": "validation.jsonl",
    "winogrande": "validation.jsonl",
    "arc_easy": "test.jsonl",
    "arc_challenge": "test.jsonl",
    "openbookqa": "test.jsonl",
}


def write_samples(folder: Path, **changed: list[Any]) -> Path:
    """All tasks' files in ``folder``; ``changed`` gives a task other rows."""
    for task, rows in {**ROWS, **changed}.items():
        (folder / task).mkdir(parents=True, exist_ok=True)
        (folder / task / FILES[task]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "piqa" / "valid-labels.lst").write_text("".join(f"{label}\n" for label in PIQA_LABELS))
    return folder


def data_of(folder: Path | str, kind: str, **settings: Any) -> CommonsenseData:
    """A data module over ``folder`` with one of the kinds of tokenizers."""
    data = CommonsenseData(str(folder), **{"window": 64, "batch_size": 8, **settings})
    data.use_tokenizer(tokenizer_of(kind))
    return data


def tiny_model(kind: str) -> PreTrainedModel:
    """A random model for that kind of tokenizer: OPT for ``opt``, else LLaMA. Always the same weights."""
    return _tiny_model("opt" if kind == "opt" else "llama")()


@lru_cache
def _tiny_model(family: str) -> Callable[[], Any]:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 1024,
    }
    llama, opt = LlamaConfig(**sizes, intermediate_size=64), OPTConfig(**sizes, ffn_dim=64, word_embed_proj_dim=16)
    model = AutoModelForCausalLM.from_config(opt if family == "opt" else llama).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.1 * noise if "norm" in path and path.endswith("weight") else 0.1 * noise)
    return replicas(model)
