"""From text to tokens, exactly as lm-evaluation-harness 0.4.13 does it for causal models.

Context and continuation are tokenised together and split where the context's own tokens end, white space at the end of
a context moves to the continuation, and special tokens are the tokenizer's own default (``lm_eval.api.model``,
``TemplateLM._encode_pair``; ``lm_eval.models.huggingface``, ``HFLM.tok_encode``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from transformers import PreTrainedTokenizerBase

from pp_lightning.commonsense.rows import Question
from pp_lightning.errors import UserError


@dataclass(frozen=True)
class EncodedRow:
    """One context and continuation.

    Attributes:
        inputs: what the model is run on: all tokens but the last, cut on the left to the window.
        continuation: the tokens that are scored. The last of them is not among ``inputs``.
        cut: tokens that the context lost on its left.
    """

    inputs: tuple[int, ...]
    continuation: tuple[int, ...]
    cut: int


@dataclass(frozen=True)
class EncodedQuestion:
    """A question and one row for each of its choices."""

    question: Question
    rows: tuple[EncodedRow, ...]

    @property
    def longest(self) -> int:
        """Tokens of its longest input."""
        return max(len(row.inputs) for row in self.rows)


def encode_questions(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], window: int
) -> list[EncodedQuestion]:
    """Tokenise questions, in order.

    A row that is longer than ``window``, the harness's ``max_length``, loses tokens on the left.

    Raises:
        UserError: a continuation alone exceeds the window, or has no tokens of its own.
    """
    pairs = [_spaces_moved(*pair) for q in questions for pair in zip(q.contexts, q.continuations, strict=True)]
    contexts = _token_ids(tokenizer, sorted({context for context, _ in pairs}))
    wholes = _token_ids(tokenizer, sorted({context + continuation for context, continuation in pairs}))
    encoded, remaining = [], iter(pairs)
    for question in questions:
        rows = []
        for context, continuation in islice(remaining, len(question.continuations)):
            alone, whole = contexts[context], wholes[context + continuation]
            rows.append(encoded_row(alone, whole[len(alone) :], window, question.origin))
        encoded.append(EncodedQuestion(question, tuple(rows)))
    return encoded


def _spaces_moved(context: str, continuation: str) -> tuple[str, str]:
    """White space at the end of a context belongs to the first word of the continuation."""
    bare = context.rstrip()
    return bare, context[len(bare) :] + continuation


def encoded_row(context: Sequence[int], continuation: Sequence[int], window: int, origin: str) -> EncodedRow:
    """One row, cut on the left to the window.

    The harness joins the two parts, which matters where a continuation changes how the end of its context is split.

    ``continuation`` is what follows as many tokens as ``context`` has in the two texts together.
    """
    if not context or not continuation:
        raise UserError(f"{origin}: the tokenizer leaves no token for {'a choice' if context else 'the context'}")
    if len(continuation) > window:
        raise UserError(
            f"{origin}: a choice alone has {len(continuation)} tokens, which exceeds the window of {window}"
        )
    joined = [*context, *continuation]
    return EncodedRow(tuple(joined[-(window + 1) : -1]), tuple(continuation), max(0, len(joined) - (window + 1)))


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, list[int]]:
    """Token ids by text, many at once, each as the harness would have them alone."""
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    prefix = None if first is None else tokenizer.decode(first)
    found: dict[str, list[int]] = {}
    for special in (False, True):
        # A text that starts with the first special token gets no second one.
        own = [text for text in texts if (prefix is None or not text.startswith(prefix)) == special]
        if own:
            # verbose=False: rows beyond the model's length are cut later; the warning about them would mislead
            ids = tokenizer(own, add_special_tokens=special, verbose=False)["input_ids"]
            found |= zip(own, ids, strict=True)
    return found
