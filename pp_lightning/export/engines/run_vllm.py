"""Run a transformers folder in vLLM: see :mod:`pp_lightning.export.engines.run`."""

import json
import os
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # all in this process: each further one imports everything again
import vllm


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Tokens, losses and the version, as asked."""
    code = Path(request["folder"], "modeling_pruned.py").exists()
    config = json.loads(Path(request["folder"], "config.json").read_text())
    longest = max([len(p) + request["steps"] for p in request["prompts"]] + [len(w) + 1 for w in request["windows"]])
    model = vllm.LLM(
        request["folder"],
        trust_remote_code=code,
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype=config["dtype"],  # by itself it would halve float32
        max_model_len=longest,
        max_num_batched_tokens=max(longest, 2048),
        kv_cache_memory_bytes=1 << 28,
        **request.get("arguments", {}),
    )
    tokens, losses = [], []
    if request["prompts"]:
        settings = vllm.SamplingParams(temperature=0, max_tokens=request["steps"], ignore_eos=True, detokenize=False)
        given = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
        tokens = [list(one.outputs[0].token_ids) for one in model.generate(given, settings)]
    if request["windows"]:
        settings = vllm.SamplingParams(
            temperature=0, max_tokens=1, prompt_logprobs=0, ignore_eos=True, detokenize=False
        )
        given = [{"prompt_token_ids": window} for window in request["windows"]]
        for window, one in zip(request["windows"], model.generate(given, settings), strict=True):
            rows = list(one.prompt_logprobs)[1:]
            losses.append(-sum(row[token].logprob for row, token in zip(rows, window[1:], strict=True)))
    return {"version": f"vllm {vllm.__version__}", "tokens": tokens, "losses": losses, "texts": []}
