"""Scores do not depend on how rows are batched, and are what the whole model gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, OPTConfig, Qwen2Config, Qwen3Config

from pp_lightning import UserError, calibrate, frozen_history, kept_units, prune_, unprune_
from pp_lightning.commonsense import score_batch
from pp_lightning.commonsense.batching import ChoiceBatch, collate_questions, group_questions
from pp_lightning.commonsense.encoding import EncodedQuestion, EncodedRow
from pp_lightning.commonsense.rows import Question
from pp_lightning.commonsense.scoring import check_window
from pp_lightning.families import stack_of
from pp_lightning.methods import FLAP, ProbePruning, WandaSP
from tests.commonsense.samples import data_of, tiny_model, write_samples
from tests.commonsense.tokenizers import KINDS, TEXT, VOCABULARY, tokenizer_of

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "initializer_range": 0.1,
}
OTHER_MODELS = {
    "mistral": MistralConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "opt_with_projections": OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=48,
        init_std=0.1,
    ),
}


def question(*lengths: tuple[int, int], start: int = 10, gold: int = 0) -> EncodedQuestion:
    """A question of rows with (input, continuation) lengths and arbitrary tokens."""
    rows = []
    for number, (inputs, continuation) in enumerate(lengths):
        tokens = [(start + 7 * number + i * i) % 300 + 5 for i in range(inputs + 1)]
        rows.append(EncodedRow(tuple(tokens[:-1]), tuple(tokens[-continuation:]), 0))
    texts = tuple(f" choice {n}" for n in range(len(lengths)))
    return EncodedQuestion(Question(("context",) * len(lengths), texts, gold, f"made up, line {start}"), tuple(rows))


def all_scores(model: Any, data: Any, task: str) -> dict[tuple[int, int], float]:
    """Scores by question and choice, whatever the order of batches."""
    scores = {}
    questions = [question for group in data.groups(task) for question in group]
    rows = [(q.question.origin, i) for q in questions for i in range(len(q.rows))]
    scored = (score_batch(model, batch, choose_on=data.choose_on) for batch in data.test_batches(task))
    values = [s for scores in scored for s in scores.log_likelihood.tolist()]
    for row, value in zip(rows, values, strict=True):
        scores[row] = value
    return scores


@torch.no_grad()
def reference(model: Any, row: EncodedRow) -> float:
    """One row at a time through the whole model, float64 log-softmax."""
    logits = model(torch.tensor([row.inputs])).logits[0].double().log_softmax(-1)[-len(row.continuation) :]
    return float(logits.gather(1, torch.tensor(row.continuation)[:, None]).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_dense_scores_do_not_depend_on_batches(kind: str, tmp_path: Path) -> None:
    folder, model = write_samples(tmp_path), tiny_model(kind)
    expected = None
    for settings in ({"batch_size": 5}, {"batch_size": 40}, {"batch_size": 12, "longest_first": False}):
        data = data_of(folder, kind, **settings)
        found = {task: all_scores(model, data, task) for task in data.tasks}
        expected = expected or found
        for task, scores in found.items():
            assert scores == pytest.approx(expected[task], abs=1e-4)
    for group in data.groups("boolq"):
        for one in group:
            for index, row in enumerate(one.rows):
                assert reference(model, row) == pytest.approx(found["boolq"][one.question.origin, index], abs=1e-4)


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_other_models_score_as_their_own_logits(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(OTHER_MODELS[name]).eval()
    asked = question((9, 3), (12, 6), (5, 1))
    scores = score_batch(model, collate_questions([asked], pad_id=0))
    assert scores.log_likelihood.tolist() == pytest.approx([reference(model, row) for row in asked.rows], abs=1e-4)
    assert scores.tokens.tolist() == [3, 6, 1]


def test_equal_inputs_are_run_once() -> None:
    """BoolQ's two rows differ in the token that is only scored."""
    row = EncodedRow((5, 6, 7), (8,), 0)
    other = EncodedRow((5, 6, 7), (9,), 0)
    longer = EncodedRow((5, 6, 7, 8), (8, 9), 0)
    asked = EncodedQuestion(Question(("c",) * 3, (" a", " b", " c"), 0, "x"), (row, other, longer))
    batch = collate_questions([asked], pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [5, 6, 7, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["row_input"].tolist() == [0, 0, 1]
    assert batch["targets"].tolist() == [8, 9, 8, 9]
    assert batch["target_row"].tolist() == [0, 1, 2, 2]
    assert batch["target_position"].tolist() == [2, 2, 2, 3]
    scores = score_batch(tiny_model("metaspace"), batch).log_likelihood
    expected = [reference(tiny_model("metaspace"), r) for r in asked.rows]
    assert scores.tolist() == pytest.approx(expected, abs=1e-4)


def test_batches_hold_whole_questions() -> None:
    sizes = [2, 3, 4, 5, 3, 2]
    asked = [question(*[(4 + index + n, 1) for n in range(size)], start=index) for index, size in enumerate(sizes)]
    in_order = group_questions(asked, 7, longest_first=False)
    assert [[len(q.rows) for q in group] for group in in_order] == [[2, 3], [4], [5], [3, 2]]
    sorted_ = group_questions(asked, 7, longest_first=True)
    longest = [q.longest for group in sorted_ for q in group]
    assert longest == sorted(longest, reverse=True)
    assert {q.question.origin for group in sorted_ for q in group} == {q.question.origin for q in asked}
    assert all(sum(len(q.rows) for q in group) <= 7 for group in sorted_)


def test_logits_that_are_not_finite() -> None:
    for value in (float("nan"), float("inf")):
        model = tiny_model("metaspace")
        model.lm_head.weight.data[300, 0] = value
        with pytest.raises(UserError, match="logits are not finite: check the checkpoint, or use float32"):
            score_batch(model, collate_questions([question((9, 3), (12, 6))], pad_id=0))


def test_half_precision_is_scored_in_float32() -> None:
    model = tiny_model("metaspace").bfloat16()
    asked = question((30, 20), (31, 25))
    scores = score_batch(model, collate_questions([asked], pad_id=0)).log_likelihood
    assert scores.tolist() == pytest.approx([reference(model, row) for row in asked.rows], rel=5e-3)
    assert not torch.equal(scores, scores.bfloat16().double())


def test_a_window_beyond_the_model() -> None:
    check_window(tiny_model("opt"), 1024)
    with pytest.raises(UserError, match="a window of 1025 tokens exceeds the 1024 positions"):
        check_window(tiny_model("opt"), 1025)


def statistics(model: Any, kind: str) -> Any:
    ids = torch.tensor(tokenizer_of(kind)("\n".join(TEXT[:200]))["input_ids"][: 8 * 64]).view(8, 64)
    return calibrate(model, [{"input_ids": ids}], progress=False)


@pytest.mark.parametrize("method", [ProbePruning(), FLAP(), WandaSP()], ids=lambda method: method.label)
@pytest.mark.parametrize("kind", ["metaspace", "opt"])
def test_pruned_models_score_as_their_own_logits(kind: str, method: Any, tmp_path: Path) -> None:
    """The same batch through the whole model and through the scoring: same choice, same scores."""
    model = tiny_model(kind)
    dense = next(data_of(write_samples(tmp_path), kind).test_batches("hellaswag"))
    unpruned = score_batch(model, dense).log_likelihood
    prune_(model, method, statistics(model, kind), pruning_ratio=0.4, skip_layers=[0], round_to=8)
    batch: ChoiceBatch = dense
    with frozen_history(model), torch.no_grad():
        scores = score_batch(model, batch).log_likelihood
        kept = kept_units(model)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        assert all(torch.equal(kept[i].mlp, units.mlp) for i, units in kept_units(model).items())
    where = batch["row_input"][batch["target_row"]], batch["target_position"]
    picked = logits.float().log_softmax(-1)[where].gather(1, batch["targets"][:, None])[:, 0].double()
    expected = torch.zeros(len(scores), dtype=torch.float64).index_add_(0, batch["target_row"], picked)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
    assert not torch.allclose(scores, unpruned, atol=1e-2)
    unprune_(model)
    torch.testing.assert_close(score_batch(model, batch).log_likelihood, unpruned)


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_that_pruning_hooks_into_is_the_models_own(kind: str) -> None:
    model = tiny_model(kind)
    assert stack_of(model) is model.get_decoder()
