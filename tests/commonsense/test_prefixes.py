"""Running what rows have in common once changes no score, and never happens under dynamic pruning."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig

from pp_lightning import prune_
from pp_lightning.commonsense import score_batch
from pp_lightning.commonsense.batching import RowBatch, collate_questions, collate_rows
from pp_lightning.commonsense.encoding import EncodedQuestion, EncodedRow
from pp_lightning.commonsense.prefixes import beginnings, remainders, worth_sharing
from pp_lightning.commonsense.rows import Question
from pp_lightning.methods import FLAP, ProbePruning, WandaSP
from tests.commonsense.samples import data_of, tiny_model, write_samples
from tests.commonsense.test_scoring import OTHER_MODELS, SMALL, reference, statistics
from tests.commonsense.tokenizers import KINDS


def question(context: list[int], *continuations: list[int]) -> EncodedQuestion:
    rows = tuple(EncodedRow((*context, *tokens)[:-1], tuple(tokens), 0) for tokens in continuations)
    texts = tuple(f" {number}" for number in range(len(rows)))
    return EncodedQuestion(Question(("context",) * len(rows), texts, 0, "made up"), rows)


ASKED = [
    question([3, 4, 5, 6, 7, 8, 9, 10, 11], [20, 21, 22], [30], [20, 21, 40, 41, 42]),
    question([13, 14, 15, 16, 17, 18], [20], [21]),
    question([23, 24, 25, 26, 27, 28, 29, 31], [33, 34], [35, 36, 37]),
]


@contextmanager
def decoder_calls(model: Any) -> Iterator[list[torch.Size]]:
    """Shapes of the token ids that the decoder is called with."""
    shapes: list[torch.Size] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda _, args, given: shapes.append(given["input_ids"].shape), with_kwargs=True
    )
    yield shapes
    hook.remove()


def without_sharing(batch: RowBatch) -> Any:
    return {**batch, "prefix_tokens": torch.zeros_like(batch["prefix_tokens"])}


def test_the_two_passes() -> None:
    batch = collate_questions(ASKED, pad_id=0)
    # the last token of a context predicts the first of the continuation, so it is in the second pass
    assert batch["prefix_tokens"].tolist() == [8, 5, 7]
    assert batch["prefix_of_input"].tolist() == [0, 0, 0, 1, 2, 2]  # the second question's rows share one input
    first, second = beginnings(batch), remainders(batch)
    assert first.input_ids[0].tolist() == [3, 4, 5, 6, 7, 8, 9, 10]
    assert first.attention_mask.tolist() == [[1] * 8, [0] * 3 + [1] * 5, [0] + [1] * 7]
    assert first.position_ids[1].tolist() == [0, 0, 0, 0, 1, 2, 3, 4]
    assert second.input_ids[2].tolist() == [11, 20, 21, 40, 41]
    assert second.position_ids[2].tolist() == [8, 9, 10, 11, 12]
    assert second.attention_mask[4].tolist() == [0] + [1] * 7 + [1, 1, 0, 0, 0]


@pytest.mark.parametrize("name", [*OTHER_MODELS, *KINDS])
def test_scores_stay(name: str) -> None:
    torch.manual_seed(0)
    other = name in OTHER_MODELS
    model = AutoModelForCausalLM.from_config(OTHER_MODELS[name]).eval() if other else tiny_model(name)
    batch = collate_questions(ASKED, pad_id=0)
    with decoder_calls(model) as shapes:
        scores = score_batch(model, batch).log_likelihood
        assert shapes == [(3, 8), (6, 5)]
        whole = score_batch(model, without_sharing(batch)).log_likelihood
        assert shapes[2:] == [(6, 13)]
    torch.testing.assert_close(scores, whole, atol=1e-4, rtol=0)
    expected = [reference(model, row) for asked in ASKED for row in asked.rows]
    assert scores.tolist() == pytest.approx(expected, abs=1e-4)


def test_a_sliding_window_shorter_than_the_rows_is_not_shared() -> None:
    batch = collate_questions(ASKED, pad_id=0)
    assert worth_sharing(batch, MistralConfig(**SMALL, sliding_window=14))
    torch.manual_seed(0)
    config = MistralConfig(**SMALL, sliding_window=6)
    assert not worth_sharing(batch, config)
    model = AutoModelForCausalLM.from_config(config).eval()
    expected = [reference(model, row) for asked in ASKED for row in asked.rows]
    assert score_batch(model, batch).log_likelihood.tolist() == pytest.approx(expected, abs=1e-4)


def test_rows_with_nothing_in_common_are_run_whole() -> None:
    config = tiny_model("opt").config
    assert worth_sharing(collate_questions(ASKED, pad_id=0), config)
    assert not worth_sharing(collate_rows([row for asked in ASKED for row in asked.rows], pad_id=0), config)
    different = EncodedQuestion(ASKED[0].question, (*ASKED[0].rows[:2], *ASKED[2].rows[:1]))
    assert collate_questions([different], pad_id=0)["prefix_tokens"].tolist() == [0]
    assert not worth_sharing(collate_questions([different, ASKED[1]], pad_id=0), config)


@pytest.mark.parametrize("method", [ProbePruning(), FLAP(), WandaSP()], ids=lambda method: method.label)
@pytest.mark.parametrize("kind", ["metaspace", "opt"])
def test_pruned_models(kind: str, method: Any, tmp_path: Path) -> None:
    """Static methods share; a dynamic one is given whole rows, since it chooses on them."""
    model = tiny_model(kind)
    prune_(model, method, statistics(model, kind), pruning_ratio=0.4, skip_layers=[0], round_to=8)
    batch = next(data_of(write_samples(tmp_path), kind).test_batches("arc_easy"))
    assert worth_sharing(batch, model.config)
    with decoder_calls(model) as shapes:
        scores = score_batch(model, batch).log_likelihood
        assert len(shapes) == (1 if method.label == "pp" else 2)
        if method.label != "pp":
            torch.testing.assert_close(
                scores, score_batch(model, without_sharing(batch)).log_likelihood, atol=1e-4, rtol=0
            )
