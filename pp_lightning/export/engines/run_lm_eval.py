"""Run a transformers folder as lm-evaluation-harness's ``--model hf`` does: see :mod:`export.engines.run`."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Tokens, losses and the version, as asked."""
    code = Path(request["folder"], "modeling_pruned.py").exists()
    model = HFLM(pretrained=request["folder"], trust_remote_code=code, dtype="auto", device="cpu", batch_size=1)
    tokens = []
    for prompt in request["prompts"]:
        text = list(prompt)
        while len(text) < len(prompt) + request["steps"]:
            text.append(int(model._model_call(torch.tensor([text]))[0, -1].argmax()))
        tokens.append(text[len(prompt) :])
    windows = [(("", ""), window[:1], window[1:]) for window in request["windows"]]
    losses = [-float(score) for score, _ in model._loglikelihood_tokens(windows, disable_tqdm=True)]
    texts = [model.tok_encode(text) for text in request["texts"]]
    return {"version": f"lm_eval {version('lm_eval')}", "tokens": tokens, "losses": losses, "texts": texts}
