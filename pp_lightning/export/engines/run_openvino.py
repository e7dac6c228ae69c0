"""Run ``model.onnx`` in OpenVINO as it stands: see :mod:`pp_lightning.export.engines.run`."""

from pathlib import Path
from typing import Any

import numpy as np
import openvino
from answering import loss_of


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Tokens, losses and the version, as asked."""
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(str(Path(request["folder"]) / "model.onnx"), "CPU", settings)
    tokens = []
    for prompt in request["prompts"]:
        outputs, found, held = _run(model, prompt, None), [], len(prompt)
        while True:
            found.append(int(outputs["logits"][0, -1].argmax()))
            if len(found) == request["steps"]:
                break
            outputs, held = _run(model, found[-1:], outputs, held), held + 1
        tokens.append(found)
    losses = [loss_of(_run(model, window, None)["logits"][0], window) for window in request["windows"]]
    version = f"openvino {openvino.get_version().split('-')[0]}"
    return {"version": version, "tokens": tokens, "losses": losses, "texts": []}


def _run(model: Any, ids: list[int], before: dict[str, Any] | None, held: int = 0) -> dict[str, Any]:
    """All outputs by name; keys and values of the call before go in."""
    inputs: dict[str, Any] = {
        "input_ids": np.array([ids], dtype=np.int64),
        "attention_mask": np.ones((1, held + len(ids)), dtype=np.int64),
        "position_ids": np.arange(held, held + len(ids), dtype=np.int64)[None],
    }
    for one in model.inputs:
        name = next(iter(one.get_names() & {n for n in one.get_names() if n.startswith("past")}), None)
        if name is not None:
            _, heads, _, size = one.get_partial_shape()
            empty = np.zeros((1, heads.get_length(), 0, size.get_length()), dtype=np.float32)
            inputs[name] = empty if before is None else before[name.replace("past_key_values", "present")]
    known = {name for one in model.inputs for name in one.get_names()}
    result = model({name: array for name, array in inputs.items() if name in known})
    return {name: result[one].copy() for one in model.outputs for name in one.get_names()}
