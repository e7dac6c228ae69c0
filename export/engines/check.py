"""Proof that an export computes in a real engine what the pruned model computed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from export.engines.run import Engine, ask
from export.sizes import longest_text
from export.verify import model_runner
from pp_lightning.errors import UserError

_PROMPTS, _TOKENS, _STEPS = 3, 16, 32
LOSS_TOLERANCE = 1e-3  # relative: engines keep keys and values in half precision, or fuse


@dataclass(frozen=True)
class Expected:
    """What an engine is asked, and what the model answers.

    Attributes:
        prompts: token ids (rows, tokens).
        tokens: greedy continuation of each, by the model.
        losses: of each prompt continued so: negative log-likelihood, summed.
    """

    prompts: list[list[int]]
    tokens: list[list[int]]
    losses: list[float]

    @staticmethod
    @torch.no_grad()
    def of(model: PreTrainedModel) -> "Expected":
        """Ask the model, on whatever device it is."""
        size = min(_TOKENS, longest_text(model) // 2)
        steps = min(_STEPS, longest_text(model) - size)
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(0, model.config.vocab_size, (_PROMPTS, size), generator=generator)
        run, text, given, cache = model_runner(model), prompts, prompts, None
        for _ in range(steps):
            logits, cache = run(given, torch.ones_like(text), cache)
            given = logits[:, -1].argmax(-1, keepdim=True)
            text = torch.cat([text, given], dim=1)
            given = text if cache is None else given
        mask = torch.ones_like(text)
        scores = run(text, mask, None)[0].double().log_softmax(-1)[:, :-1]
        losses = -scores.gather(2, text[:, 1:, None]).sum((1, 2))
        return Expected(prompts.tolist(), text[:, size:].tolist(), losses.tolist())


@dataclass(frozen=True)
class EngineCheck:
    """How an engine answered.

    Attributes:
        engine: its name.
        version: package and version.
        same_tokens: greedy tokens equal to the model's.
        of_tokens: that were compared.
        loss_difference: largest relative difference of a loss.
    """

    engine: Engine
    version: str
    same_tokens: int
    of_tokens: int
    loss_difference: float


def check_with(engine: Engine, folder: Path, expected: Expected, *, exact: bool, **more: Any) -> EngineCheck:
    """Run an export in an engine.

    Args:
        engine: its name.
        folder: of the export.
        expected: of the model.
        exact: whether all tokens must be equal; else, in half precision or quantised, they are counted only.
        more: what the engine's runner understands besides.

    Raises:
        UserError: the engine cannot run it, or computes something else.
    """
    prompts = expected.prompts
    windows = [[*prompt, *found] for prompt, found in zip(prompts, expected.tokens, strict=True)]
    answer = ask(engine, folder, prompts=prompts, steps=len(expected.tokens[0]), windows=windows, **more)
    pairs = zip(expected.tokens, answer.tokens, strict=True)
    same = sum(a == b for wanted, found in pairs for a, b in zip(wanted, found, strict=True))
    number = sum(len(row) for row in expected.tokens)
    off = max(abs(a - b) / max(abs(a), 1e-9) for a, b in zip(expected.losses, answer.losses, strict=True))
    if exact and (same < number or not off <= LOSS_TOLERANCE):
        raise UserError(
            f"{answer.version} computes something else: {same} of {number} greedy tokens equal, losses off by {off:.1e}"
        )
    return EngineCheck(engine, answer.version, same, number, off)
