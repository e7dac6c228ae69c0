"""Choosing on contexts: no answer has a say, and what is scored is what plain calls with the prompt's cache give."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig

from pp_lightning import UserError, kept_units, load_pruning_state, prune_, pruning_state
from pp_lightning.app.scoring import TaskScoring
from pp_lightning.commonsense import CommonsenseData, evaluate_tasks, score_batch
from pp_lightning.commonsense.batching import ChoiceBatch, collate_questions
from pp_lightning.commonsense.encoding import EncodedQuestion, EncodedRow
from pp_lightning.commonsense.prefixes import beginnings, continuation_states, with_prompts
from pp_lightning.methods import FLAP, ProbePruning, WandaSP
from tests.commonsense.samples import data_of, tiny_model, write_samples
from tests.commonsense.test_evaluate import plain
from tests.commonsense.test_prefixes import ASKED, decoder_calls, question
from tests.commonsense.test_scoring import SMALL, all_scores, reference, statistics

DYNAMIC: dict[str, Any] = {
    "paper": ProbePruning,
    "best": ProbePruning.best,
    "dense prompt": lambda: ProbePruning(prefill="dense"),
    "best, dense prompt": lambda: ProbePruning.best(generation=True),
}
# Published probes of these few tokens are two tokens of one row, which is often the same under both settings.
ALL_ROWS = {"row_ratio": 1.0, "token_ratio": 1.0}
SEEING: dict[str, Any] = {
    "paper": lambda: ProbePruning(**ALL_ROWS),
    "best": ProbePruning.best,
    "dense prompt": lambda: ProbePruning(**ALL_ROWS, prefill="dense"),
    "best, dense prompt": lambda: ProbePruning.best(generation=True),
}
# What a question of WinoGrande looks like: the options differ, what follows them is scored.
BLANK = EncodedQuestion(
    ASKED[0].question,
    (
        EncodedRow((3, 4, 5, 6, 50, 60, 61), (60, 61, 62), 0),
        EncodedRow((3, 4, 5, 6, 51, 52, 60, 61), (60, 61, 62), 0),
    ),
)


def pruned(method: Any = ProbePruning, kind: str = "metaspace", **settings: Any) -> Any:
    model = tiny_model(kind)
    amounts = {"pruning_ratio": 0.4, "skip_layers": [0], "round_to": 8}
    prune_(model, method(), statistics(model, kind), **amounts, **settings)
    return model


def units(model: Any) -> list[torch.Tensor]:
    return [part for one in kept_units(model).values() for part in (one.attention, one.mlp)]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@torch.no_grad()
def by_plain_calls(model: Any, asked: list[EncodedQuestion], prompts: list[list[int]], owner: list[int]) -> list[float]:
    """The prompts in one batch, then every row by itself behind a copy of its prompt's cache.

    Args:
        model: pruned.
        asked: questions.
        prompts: of different rows.
        owner: prompt of each row.
    """
    width = max(map(len, prompts))
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts])
    ids = torch.tensor([[0] * (width - len(one)) + one for one in prompts])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    cache = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=True).past_key_values
    scores = []
    for row, number in zip([row for one in asked for row in one.rows], owner, strict=True):
        own, past = copy.deepcopy(cache), len(prompts[number])
        own.batch_select_indices(torch.tensor([number]))
        rest = torch.tensor([row.inputs[past:]])
        seen = torch.cat([mask[number : number + 1], torch.ones_like(rest)], 1)
        after = torch.arange(past, len(row.inputs))[None]
        out = model(input_ids=rest, attention_mask=seen, position_ids=after, past_key_values=own, use_cache=True)
        chances = out.logits[0, -len(row.continuation) :].double().log_softmax(-1)
        scores.append(float(chances.gather(1, torch.tensor(row.continuation)[:, None]).sum()))
    return scores


@pytest.mark.parametrize("method", [None, FLAP, WandaSP], ids=["dense", "flap", "wanda_sp"])
def test_dense_and_static_models_score_the_same(method: Any, tmp_path: Path) -> None:
    model = tiny_model("metaspace") if method is None else pruned(method)
    by_row, by_context = (
        data_of(write_samples(tmp_path), "metaspace", window=40, choose_on=name) for name in ("row", "context")
    )
    for task in by_row.tasks:
        assert all_scores(model, by_context, task) == pytest.approx(all_scores(model, by_row, task), abs=1e-4)
    found = [plain(evaluate_tasks(model, data)) for data in (by_row, by_context)]
    assert found[0]["tasks"] == found[1]["tasks"] and found[0]["mean"] == found[1]["mean"]


def test_a_dynamic_model_scores_differently(tmp_path: Path) -> None:
    """The negative control of the test above."""
    folder, model = write_samples(tmp_path), pruned()
    state, found = pruning_state(model), []
    for name in ("row", "context"):
        load_pruning_state(model, state)
        found.append(all_scores(model, data_of(folder, "metaspace", choose_on=name), "hellaswag"))
    assert found[0] != pytest.approx(found[1], abs=1e-2)


@pytest.mark.parametrize("method", SEEING)
def test_answers_have_no_say(method: str) -> None:
    model = pruned(SEEING[method])
    others = [
        question([3, 4, 5, 6, 7, 8, 9, 10, 11], [320, 321, 322, 323, 324, 325], [130], [321, 421]),
        question([13, 14, 15, 16, 17, 18], [120, 700, 701], [121, 99, 98, 97, 96]),
        question([23, 24, 25, 26, 27, 28, 29, 31], [333, 334], [335, 336, 337]),
    ]
    state = pruning_state(model)
    kept: dict[str, list[list[torch.Tensor]]] = {"row": [], "context": []}
    for choose_on, found in kept.items():
        for asked in (ASKED, others):
            load_pruning_state(model, state)
            score_batch(model, collate_questions(asked, pad_id=0), choose_on=choose_on)  # type: ignore[arg-type]
            found.append(units(model))
    assert same(*kept["context"])
    assert not same(*kept["row"])  # negative control


def test_answers_have_no_say_in_what_a_batch_holds(tmp_path: Path) -> None:
    """Longer answers change the order of rows, and not that of contexts."""
    rows = [{"goal": f"clean {'a cage ' * n}", "sol1": "use water", "sol2": "burn it"} for n in (3, 1, 4, 2)]
    longer = [row | {"sol2": row["sol2"] + " with much ethanol" * (8 * (n == 1))} for n, row in enumerate(rows)]
    contexts: dict[str, list[Any]] = {"row": [], "context": []}
    for choose_on, found in contexts.items():
        for number, piqa in enumerate((rows, longer)):
            folder = write_samples(tmp_path / f"{choose_on} {number}", piqa=piqa)
            (folder / "piqa" / "valid-labels.lst").write_text("0\n" * len(piqa))
            data = data_of(folder, "metaspace", window=128, batch_size=4, choose_on=choose_on)
            found.append([beginnings(with_prompts(b)).input_ids.tolist() for b in data.test_batches("piqa")])
            assert len(found[-1]) == 2
    assert contexts["context"][0] == contexts["context"][1]
    assert contexts["row"][0] != contexts["row"][1]  # negative control


@pytest.mark.parametrize("kind", ["metaspace", "opt"])
@pytest.mark.parametrize("method", DYNAMIC)
def test_scores_are_those_of_plain_calls(method: str, kind: str) -> None:
    model = pruned(DYNAMIC[method], kind)
    state = pruning_state(model)
    alone = [[3, 4, 5, 6, 7, 8, 9, 10]], [0, 0, 0]
    three = [*alone[0], [13, 14, 15, 16, 17], [23, 24, 25, 26, 27, 28, 29]], [0, 0, 0, 1, 1, 2, 2]
    for asked, (prompts, owner) in ((ASKED[:1], alone), (ASKED, three)):
        load_pruning_state(model, state)
        expected = by_plain_calls(model, asked, prompts, owner)
        after, kept = pruning_state(model), units(model)
        load_pruning_state(model, state)
        batch = collate_questions(asked, pad_id=0)
        found = score_batch(model, batch, choose_on="context").log_likelihood
        assert found.tolist() == pytest.approx(expected, abs=1e-4)
        assert same(units(model), kept)
        torch.testing.assert_close(pruning_state(model), after)  # moved by the prompt alone
        load_pruning_state(model, state)
        assert score_batch(model, batch).log_likelihood.tolist() != pytest.approx(expected, abs=1e-2)


def test_contexts_that_differ_choose_by_what_they_have_in_common() -> None:
    """The options of WinoGrande are in its contexts: neither has a say."""
    model = pruned(SEEING["paper"])
    state, kept = pruning_state(model), []
    expected = by_plain_calls(model, [BLANK], [[3, 4, 5, 6]], [0, 0])
    for option in (50, 70):
        load_pruning_state(model, state)
        first = EncodedRow((3, 4, 5, 6, option, 60, 61), (60, 61, 62), 0)
        asked = EncodedQuestion(BLANK.question, (first, BLANK.rows[1]))
        scores = score_batch(model, collate_questions([asked], pad_id=0), choose_on="context").log_likelihood
        kept.append(units(model))
        assert scores[1] == pytest.approx(expected[1], abs=1e-4)
        assert (scores[0] == pytest.approx(expected[0], abs=1e-4)) == (option == 50)
    assert same(*kept)
    load_pruning_state(model, state)
    score_batch(model, collate_questions([BLANK], pad_id=0))
    assert not same(units(model), kept[0])  # negative control


def test_rows_with_nothing_in_common_choose_by_their_own_contexts() -> None:
    """Beside a question whose rows share theirs, and one of one token in front of the answer, which has no say."""
    different = EncodedQuestion(BLANK.question, (ASKED[0].rows[0], ASKED[2].rows[0]))
    short = question([40], [41, 42], [43])
    prompts = [[13, 14, 15, 16, 17], [3, 4, 5, 6, 7, 8, 9, 10], [23, 24, 25, 26, 27, 28, 29], []]
    asked, owner = [different, ASKED[1], short], [1, 2, 0, 0, 3, 3]
    batch = with_prompts(collate_questions(asked, pad_id=0))
    assert batch["prefix_tokens"].tolist()[:3] == [5, 8, 7]
    model = pruned()
    state = pruning_state(model)
    found = score_batch(model, collate_questions(asked, pad_id=0), choose_on="context").log_likelihood
    kept = units(model)
    load_pruning_state(model, state)
    assert found.tolist() == pytest.approx(by_plain_calls(model, asked, prompts, owner), abs=1e-4)
    assert same(units(model), kept)


def test_rows_that_were_cut_differently_choose_by_their_own_contexts() -> None:
    rows = (EncodedRow((5, 5, 5, 7, 8, 20), (20, 21), 0), EncodedRow((5, 5, 7, 8, 30, 31), (30, 31, 32), 1))
    batch = with_prompts(collate_questions([EncodedQuestion(ASKED[1].question, rows)], pad_id=0))
    given = beginnings(batch)
    contexts = [ids[mask.bool()].tolist() for ids, mask in zip(given.input_ids, given.attention_mask, strict=True)]
    assert contexts == [[5, 5, 5, 7], [5, 5, 7]]  # two tokens [5, 5] alike are no context


def test_questions_without_a_context_are_spread(tmp_path: Path) -> None:
    """This tokenizer puts nothing in front, so that the sentences that begin with the blank have one token there."""
    rows = [{"sentence": "_ ran so it fell.", "option1": "A", "option2": "B", "answer": "1"}] * 3
    rows += [row | {"sentence": "We saw that " * n + str(row["sentence"])} for n, row in enumerate(rows, 1)]
    folder, given = write_samples(tmp_path, winogrande=rows), {"tasks": ["winogrande"], "choose_on": "context"}
    data = data_of(folder, "byte_level", batch_size=4, **given)
    first = [with_prompts(batch)["prefix_tokens"].tolist() for batch in data.test_batches("winogrande")]
    assert [sorted(one)[:-1] for one in first] == [[0, 0]] * 3 and all(max(one) > 0 for one in first)
    evaluate_tasks(pruned(kind="byte_level"), data)
    alone = data_of(folder, "byte_level", batch_size=2, **given)  # a question a batch
    with pytest.raises(UserError, match="no context in front of its answers"):
        evaluate_tasks(pruned(kind="byte_level"), alone, progress=lambda *_: pytest.fail("the model was run"))


def test_a_batch_without_any_context_is_refused() -> None:
    batch: ChoiceBatch = collate_questions([question([40], [41, 42], [43])], pad_id=0)
    with pytest.raises(UserError, match="no context in front of its answers: use a larger batch"):
        score_batch(pruned(), batch, choose_on="context")
    score_batch(pruned(), batch)
    score_batch(tiny_model("metaspace"), batch, choose_on="context")


@pytest.mark.parametrize("window", [3, 6, 9])
@pytest.mark.parametrize("method", DYNAMIC)
def test_windows_of_attention_shorter_than_the_contexts(window: int, method: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MistralConfig(**SMALL, sliding_window=window)).eval()
    batch = collate_questions(ASKED, pad_id=0)
    with torch.no_grad():
        states = continuation_states(model.base_model, with_prompts(batch), model.device)
        chances = model.lm_head(states).double().log_softmax(-1).gather(1, batch["targets"][:, None])[:, 0]
    sums = torch.zeros(7, dtype=torch.float64).index_add_(0, batch["target_row"], chances)
    assert sums.tolist() == pytest.approx([reference(model, row) for one in ASKED for row in one.rows], abs=1e-4)
    stats = statistics(model, "metaspace")
    prune_(model, DYNAMIC[method](), stats, pruning_ratio=0.4, skip_layers=[], round_to=8)
    state = pruning_state(model)
    found = score_batch(model, batch, choose_on="context").log_likelihood
    load_pruning_state(model, state)
    prompts = [[3, 4, 5, 6, 7, 8, 9, 10], [13, 14, 15, 16, 17], [23, 24, 25, 26, 27, 28, 29]]
    assert found.tolist() == pytest.approx(by_plain_calls(model, ASKED, prompts, [0, 0, 0, 1, 1, 2, 2]), abs=1e-4)


@pytest.mark.parametrize(("choose_on", "passes"), [("row", 1), ("context", 2)])
def test_evaluations_run_as_the_data_says(choose_on: str, passes: int, tmp_path: Path) -> None:
    data, model = data_of(write_samples(tmp_path), "metaspace", choose_on=choose_on), pruned()
    with decoder_calls(model) as shapes:
        evaluate_tasks(model, data)
    assert len(shapes) == passes * sum(data.num_batches(task) for task in data.tasks)


def test_results_of_another_setting_are_not_taken(tmp_path: Path) -> None:
    folder, file = write_samples(tmp_path / "data"), tmp_path / "resume.json"
    by_context = data_of(folder, "metaspace", tasks=["piqa", "boolq"], choose_on="context")
    whole = evaluate_tasks(pruned(), by_context, resume_file=file)
    assert whole.settings["choose_on"] == "context" and whole.settings["order"] == "longest context first"
    again = evaluate_tasks(pruned(), by_context, progress=lambda *_: pytest.fail("nothing to do"), resume_file=file)
    assert plain(again) == plain(whole)
    with pytest.raises(UserError, match=r"another evaluation \(other model\)"):
        evaluate_tasks(pruned(prefill="dense"), by_context, resume_file=file)
    by_row = data_of(folder, "metaspace", tasks=["piqa", "boolq"])
    with pytest.raises(UserError, match="other choose_on, model, order"):
        evaluate_tasks(pruned(), by_row, resume_file=file)


def test_interrupted_evaluations_go_on(tmp_path: Path) -> None:
    data = data_of(write_samples(tmp_path / "data"), "metaspace", choose_on="context", batch_size=5)
    whole = plain(evaluate_tasks(pruned(ProbePruning.best), data))

    def interrupt(task: str, done: int, _: int) -> None:
        if task == "winogrande" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_tasks(pruned(ProbePruning.best), data, progress=interrupt, resume_file=tmp_path / "resume.json")
    resumed = evaluate_tasks(pruned(ProbePruning.best), data, resume_file=tmp_path / "resume.json")
    assert plain(resumed) == whole


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^choose_on must be row or context, not 'prompt'$"):
        CommonsenseData(choose_on="prompt")  # type: ignore[arg-type]
    data = data_of(write_samples(tmp_path), "metaspace", tasks=["piqa"], choose_on="context")
    with pytest.raises(UserError, match=r"^refresh would choose by the tokens of answers: leave it out"):
        evaluate_tasks(pruned(refresh=4), data)
    evaluate_tasks(pruned(refresh=4), data_of(tmp_path, "metaspace", tasks=["piqa"]))


def test_flops_are_those_of_two_passes(tmp_path: Path) -> None:
    ratios = {}
    for choose_on in ("row", "context"):
        scoring = TaskScoring(
            data_of(write_samples(tmp_path), "metaspace", tasks=["hellaswag"], choose_on=choose_on), None, None
        )
        scoring.step(pruned(), None)
        ratios[choose_on], dense = scoring.flops_ratios(), scoring.flops[0][0]
        if choose_on == "row":
            whole = dense.model
    assert dense.model < whole  # contexts count once
    assert ratios["row"].after_prompt is None
    context = ratios["context"]
    assert context.after_prompt is not None and context.after_prompt < context.model < 1
    assert context.probe > 0
