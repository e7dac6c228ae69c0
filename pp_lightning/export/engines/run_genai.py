"""Run an ONNX folder in ONNX Runtime GenAI: see :mod:`pp_lightning.export.engines.run`."""

from importlib.metadata import version
from typing import Any

import numpy as np
import onnxruntime_genai as genai
from answering import loss_of


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Tokens, losses and the version, as asked."""
    model, tokens, losses = genai.Model(request["folder"]), [], []
    for prompt in request["prompts"]:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(prompt) + request["steps"], do_sample=False)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(np.array(prompt, dtype=np.int32))
        found: list[int] = []
        while len(found) < request["steps"]:
            found.append(int(np.argmax(generator.get_logits()[0, -1])))
            if len(found) < request["steps"]:
                generator.append_tokens(np.array(found[-1:], dtype=np.int32))
        tokens.append(found)
    for window in request["windows"]:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(window) + 1)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(np.array(window, dtype=np.int32))
        losses.append(loss_of(np.asarray(generator.get_output("logits"))[0], window))
    texts = []
    if request["texts"]:
        tokenizer = genai.Tokenizer(model)
        texts = [tokenizer.encode(text).tolist() for text in request["texts"]]
    name = f"onnxruntime-genai {version('onnxruntime-genai')}"
    return {"version": name, "tokens": tokens, "losses": losses, "texts": texts}
