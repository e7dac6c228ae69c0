"""Proof that an exported folder computes what the pruned model computed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from pp_lightning.caches import CACHE
from pp_lightning.checkpoints import load_streamed
from pp_lightning.errors import UserError
from pp_lightning.export.entries import tensors_of
from pp_lightning.families import layers_of, longest_text
from pp_lightning.stored import is_settled, places_in

T = TypeVar("T")

ROWS, TOKENS, STEPS = 2, 24, 8


# Runs token ids (B, S) behind a cache (None at the start) under a mask (B, past + S), 0 at padding. Gives logits
# (B, S, V) float32 on the CPU and the cache to go on with; None where it has none, then the whole text comes again.
Runner = Callable[[Tensor, Tensor, Any], tuple[Tensor, Any]]


@dataclass(frozen=True)
class Behaviour:
    """What a model answers to a fixed prompt.

    Attributes:
        prompt: token ids (B, S).
        mask: (B, S), 0 at padding on the left of the second row.
        logits: of the prompt, (B, S, V) float32 on the CPU.
        tokens: the most likely continuation, token by token with a key/value cache, (B, steps).
        step_logits: that it was read from, (B, steps, V) float32.
    """

    prompt: Tensor
    mask: Tensor
    logits: Tensor
    tokens: Tensor
    step_logits: Tensor

    @staticmethod
    @torch.no_grad()
    def of(run: Runner, vocabulary: int, rows: int = ROWS, tokens: int = TOKENS, steps: int = STEPS) -> "Behaviour":
        """Ask on a prompt of (rows, tokens) for so many more."""
        prompt, mask = _prompt(vocabulary, rows, tokens)
        logits, cache = run(prompt, mask, None)
        return Behaviour(prompt, mask, logits, *greedy(run, prompt, mask, logits, cache, steps))

    @staticmethod
    def of_model(model: PreTrainedModel) -> "Behaviour":
        """Ask a transformers model."""
        tokens = min(TOKENS, longest_text(model.config) - STEPS)
        steps = 1 if is_settled(layers_of(model)[0]) else STEPS  # each reads all weights where they stay on disk
        return Behaviour.of(model_runner(model), model.config.vocab_size, tokens=tokens, steps=steps)


@dataclass(frozen=True)
class Int8Check:
    """How closely a quantised folder follows the model that it was made from.

    Attributes:
        divergence: mean Kullback-Leibler divergence of the next token's distribution from the unquantised model's, in
            nats a token; so much was ``allowed``.
        difference: largest difference of a logit, relative to the largest logit.
        matrices: that are int8; the others, embeddings and the vocabulary projection among them, stay as they were.
    """

    divergence: float
    allowed: float
    difference: float
    same_tokens: int
    of_tokens: int
    matrices: int
    bytes: int

    @property
    def told(self) -> str:
        """For people."""
        return (
            f"quantised: {self.matrices} matrices in int8, {self.bytes:,} bytes; the next token's distribution is "
            f"{self.divergence:.1e} nats from the unquantised one ({self.allowed} allowed), logits differ by at most "
            f"{self.difference:.1e} of the largest; {self.same_tokens} of {self.of_tokens} greedy tokens are equal"
        )


@dataclass(frozen=True)
class Agreement:
    """How closely a reloaded model follows.

    Attributes:
        largest_difference: between any two logits.
        tolerance: what was allowed.
        same_tokens: greedy tokens compared, all of them equal (or tied within the tolerance).
        swapped_units: of a dynamic graph: units that it kept in place of others as important but for rounding.
        int8: how closely it follows once it is quantised; None where it is not.
    """

    largest_difference: float
    tolerance: float
    same_tokens: int = 0
    swapped_units: int = 0
    int8: Int8Check | None = None

    @property
    def told(self) -> str:
        """For people."""
        text = (
            f"loaded and checked: logits differ by at most {self.largest_difference:.1e} ({self.tolerance:.1e} allowed)"
        )
        text += f"; {self.same_tokens} greedy tokens are equal" if self.same_tokens else ""
        text += f"; {self.swapped_units} kept units differ by rounding" if self.swapped_units else ""
        return text if self.int8 is None else f"{text}\n{self.int8.told}"


@torch.no_grad()
def verify(
    folder: Path, expected: Behaviour, device: torch.device, *, bundled_code: bool, streamed: bool = False
) -> Agreement:
    """Load a transformers folder as a user would and compare it with the pruned model that it was written from.

    ``bundled_code`` says that it brings its own modelling file, which we wrote a moment ago: the only code that is ever
    trusted here. ``streamed`` leaves the weights of its layers on disk.

    Raises:
        UserError: weights are missing, superfluous or of another shape, or logits or tokens differ.
    """
    if streamed:
        reloaded = load_streamed(str(folder), "auto", bundled_code=bundled_code)
        extra = places_in(folder).keys() - tensors_of(reloaded).keys()
        if extra:
            raise UserError(f"the export failed its check: unexpected keys {sorted(extra)[:3]}")
        return compare(expected, Behaviour.of_model(reloaded), reloaded.dtype, reloaded.config.num_hidden_layers)
    model, report = or_refuse(
        lambda: AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", output_loading_info=True, use_safetensors=True, trust_remote_code=bundled_code
        ),
        "the export failed its check: transformers cannot load it",
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            raise UserError(f"the export failed its check: {problem.replace('_', ' ')} {sorted(report[problem])[:3]}")
    return compare(expected, Behaviour.of_model(model.eval().to(device)), model.dtype, model.config.num_hidden_layers)


def or_refuse(work: Callable[[], T], failure: str) -> T:
    """The result of work; whatever torch, transformers or a runtime raises is told in one line."""
    try:
        return work()
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{failure}: {reason}") from error


def compare(expected: Behaviour, found: Behaviour, dtype: torch.dtype, num_layers: int) -> Agreement:
    """Refuse a behaviour that differs by more than rounding.

    Raises:
        UserError: logits or tokens differ.
    """
    real = expected.mask.bool()
    difference = float((expected.logits - found.logits)[real].abs().max())
    allowed = tolerance(dtype, num_layers) * max(1.0, float(expected.logits[real].abs().max()))
    if not difference <= allowed:  # NaN too
        raise UserError(f"the export failed its check: logits differ by {difference:.2g}, more than {allowed:.2g}")
    for row in range(len(expected.tokens)):
        _check_tokens(expected, found, row, allowed)
    return Agreement(difference, allowed, expected.tokens.numel())


def tolerance(dtype: torch.dtype, num_layers: int) -> float:
    """Difference allowed between logits, relative to the largest of them.

    In half precision every block of a padded model may round another way, and such errors add up like a random walk.
    """
    if dtype in (torch.float32, torch.float64):
        return 1e-5
    return float(torch.finfo(dtype).eps * (2 * num_layers) ** 0.5)


def _check_tokens(expected: Behaviour, found: Behaviour, row: int, allowed: float) -> None:
    differing = (expected.tokens[row] != found.tokens[row]).nonzero()
    if not len(differing):
        return
    step = int(differing[0])
    logits, pair = expected.step_logits[row, step], (expected.tokens[row, step], found.tokens[row, step])
    if float(logits[pair[0]] - logits[pair[1]]) > 2 * allowed:  # else a tie, and what follows it may differ
        raise UserError(f"the export failed its check: greedy token {step + 1} differs")


def positions_of(mask: Tensor, tokens: int) -> Tensor:
    """Position ids (B, tokens) of the last tokens under a mask (B, past + tokens)."""
    return (mask.cumsum(1) - 1).clamp(min=0)[:, mask.shape[1] - tokens :]


def model_runner(model: PreTrainedModel) -> Runner:
    """Run a transformers model, with its own cache."""

    def run(prompt: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
        output = model(
            input_ids=prompt.to(model.device),
            attention_mask=mask.to(model.device),
            position_ids=positions_of(mask, prompt.shape[1]).to(model.device),
            **{CACHE: cache},
            use_cache=True,
        )
        return output.logits.float().cpu(), output[CACHE]

    return run


def _prompt(vocabulary: int, rows: int, tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, vocabulary, (rows, tokens), generator=generator)
    mask = torch.ones_like(prompt)
    mask[1:2, : tokens // 4] = 0
    return prompt, mask


def greedy(run: Runner, prompt: Tensor, mask: Tensor, logits: Tensor, cache: Any, number: int) -> tuple[Tensor, Tensor]:
    """The tokens that follow a prompt, given its logits and the cache behind it, and the logits they were read from."""
    text, steps = prompt, [logits[:, -1]]
    for step in range(number):
        token = steps[-1].argmax(-1, keepdim=True)
        text, mask = torch.cat([text, token], dim=1), torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        if step + 1 < number:
            logits, cache = run(text if cache is None else token, mask, cache)
            steps.append(logits[:, -1])
    return text[:, prompt.shape[1] :], torch.stack(steps, dim=1)
