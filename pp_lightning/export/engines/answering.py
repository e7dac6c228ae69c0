"""Run by an engine's Python, outside the package: the runner beside this file that is named answers a request."""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def loss_of(logits: Any, window: list[int]) -> float:
    """Negative log-likelihood of a window behind its first token, from logits (S, V), a NumPy array."""
    import numpy as np

    numbers = logits[:-1].astype(np.float64)
    top = numbers.max(-1, keepdims=True)
    likely = numbers[np.arange(len(window) - 1), window[1:]] - top[:, 0] - np.log(np.exp(numbers - top).sum(-1))
    return float(-likely.sum())


if __name__ == "__main__":
    runner, asked, answered = sys.argv[1:]
    found = import_module(runner).answer(json.loads(Path(asked).read_text(encoding="utf-8")))
    Path(answered).write_text(json.dumps(found), encoding="utf-8")
