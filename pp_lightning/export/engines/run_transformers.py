"""Run a transformers folder in this Python's transformers: see :mod:`pp_lightning.export.engines.run`."""

from pathlib import Path
from typing import Any

import torch
import transformers


@torch.no_grad()
def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Tokens, losses and the version, as asked."""
    folder, code = request["folder"], Path(request["folder"], "modeling_pruned.py").exists()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=code, dtype="auto").eval()
    tokens = []
    for prompt in request["prompts"]:
        ids, steps = torch.tensor([prompt]), request["steps"]
        settings = {"do_sample": False, "max_new_tokens": steps, "min_new_tokens": steps, "pad_token_id": 0}
        model.generation_config.suppress_tokens = None
        found = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=None, **settings)
        tokens.append(found[0, len(prompt) :].tolist())
    losses = []
    for window in request["windows"]:
        ids = torch.tensor([window])
        scores = model(ids).logits.double().log_softmax(-1)[0, :-1]
        losses.append(float(-scores.gather(1, ids[0, 1:, None]).sum()))
    texts = []
    if request["texts"]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=code)
        texts = [tokenizer(text)["input_ids"] for text in request["texts"]]
    return {"version": f"transformers {transformers.__version__}", "tokens": tokens, "losses": losses, "texts": texts}
