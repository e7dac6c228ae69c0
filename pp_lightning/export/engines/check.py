"""Proof that an export computes in a real engine what the pruned model computed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pp_lightning.errors import UserError
from pp_lightning.export.engines.run import Engine, ask
from pp_lightning.export.verify import greedy, model_runner
from pp_lightning.families import longest_text

_PROMPTS, _TOKENS, _STEPS = 3, 16, 32
LOSS_TOLERANCE = 1e-3  # relative: engines keep keys and values in half precision, or fuse


@dataclass(frozen=True)
class Expected:
    """What an engine is asked, and what the model answers.

    Attributes:
        tokens: greedy continuation of each prompt, by the model.
        losses: of each prompt continued so: negative log-likelihood, summed.
        step_logits: that the tokens were read from, (rows, steps, V) float32.
    """

    prompts: list[list[int]]
    tokens: list[list[int]]
    losses: list[float]
    step_logits: Tensor

    @staticmethod
    @torch.no_grad()
    def of(model: PreTrainedModel) -> "Expected":
        """Ask the model, on whatever device it is."""
        size = min(_TOKENS, longest_text(model.config) // 2)
        steps = min(_STEPS, longest_text(model.config) - size)
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(0, model.config.vocab_size, (_PROMPTS, size), generator=generator)
        run, mask = model_runner(model), torch.ones_like(prompts)
        tokens, step_logits = greedy(run, prompts, mask, *run(prompts, mask, None), steps)
        text = torch.cat([prompts, tokens], dim=1)
        scores = run(text, torch.ones_like(text), None)[0].double().log_softmax(-1)[:, :-1]
        losses = -scores.gather(2, text[:, 1:, None]).sum((1, 2))
        return Expected(prompts.tolist(), tokens.tolist(), losses.tolist(), step_logits)


@dataclass(frozen=True)
class EngineCheck:
    """How an engine answered."""

    engine: Engine
    version: str
    same_tokens: int
    of_tokens: int
    loss_difference: float

    @property
    def told(self) -> str:
        """For people."""
        return (
            f"run in {self.version}: {self.same_tokens} of {self.of_tokens} greedy tokens are equal, losses differ by "
            f"at most {self.loss_difference:.1e}"
        )


def check_with(engine: Engine, folder: Path, expected: Expected, *, exact: bool, **more: Any) -> EngineCheck:
    """Run an export in an engine.

    If not ``exact``, in half precision or quantised, tokens are counted only. ``more`` is what the engine's runner
    understands besides.
    """
    prompts = expected.prompts
    windows = [[*prompt, *found] for prompt, found in zip(prompts, expected.tokens, strict=True)]
    answer = ask(engine, folder, prompts=prompts, steps=len(expected.tokens[0]), windows=windows, **more)
    rows = zip(expected.tokens, answer.tokens, expected.step_logits, strict=True)
    counted = [_compared(wanted, found, logits) for wanted, found, logits in rows]
    same, number = (sum(numbers) for numbers in zip(*counted, strict=True))
    off = max(abs(a - b) / max(abs(a), 1e-9) for a, b in zip(expected.losses, answer.losses, strict=True))
    if exact and (same < number or not off <= LOSS_TOLERANCE):
        raise UserError(
            f"{answer.version} computes something else: {same} of {number} greedy tokens equal, losses off by {off:.1e}"
        )
    return EngineCheck(engine, answer.version, same, number, off)


def _compared(wanted: list[int], found: list[int], logits: Tensor) -> tuple[int, int]:
    """Greedy tokens of a row that are equal, and that were compared."""
    for step, (own, other) in enumerate(zip(wanted, found, strict=True)):
        if own != other:
            gap, scale = float(logits[step, own] - logits[step, other]), float(logits[step].abs().max())
            if gap <= LOSS_TOLERANCE * scale:
                return step, step
            return sum(a == b for a, b in zip(wanted, found, strict=True)), len(wanted)
    return len(wanted), len(wanted)
