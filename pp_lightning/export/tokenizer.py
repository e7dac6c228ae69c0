"""A tokenizer beside an export, as older versions of transformers and other engines read it too."""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save it; the class of a plain ``tokenizer.json`` is called as transformers 4 calls it."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("tokenizer_class") == "TokenizersBackend":
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
