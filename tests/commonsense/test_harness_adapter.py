"""The model ``pp`` of lm-evaluation-harness: any of its tasks on a pruned model."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the extra: pip install pp-lightning[eval]")

import lm_eval.tasks
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from pp_lightning import UserError, calibrate, prune_
from pp_lightning.blocks import Block
from pp_lightning.commonsense import harness
from pp_lightning.commonsense.harness import PrunedHFLM, run_harness
from pp_lightning.methods import ProbePruning
from pp_lightning.pruning import pruning_of
from tests.commonsense.harness_tasks import GivenTasks, write_definitions
from tests.commonsense.samples import tiny_model, write_samples
from tests.commonsense.tokenizers import KINDS, TEXT, tokenizer_of

PAIRS = [
    ("A man is sitting on a roof.", " he starts pulling up roofing."),
    ("A man is sitting on a roof.", " he"),
    ("A man is sitting on a roof.", " she"),
    ("Question: is it? " * 12 + "\nAnswer:", " yes"),
    ("Question: is it? " * 12 + "\nAnswer:", " no"),
    ("", "nothing in front of it"),
    ("The blank ends in spaces  ", " water"),
]
WINDOW = 40


def requests(kind: str) -> list[Instance]:
    arguments = PAIRS if kind == "likelihood" else [(" ".join(f"{a}{b}" for a, b in PAIRS),)]
    name = "loglikelihood" if kind == "likelihood" else "loglikelihood_rolling"
    return [Instance(name, {}, pair, index) for index, pair in enumerate(arguments)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_model_answers_as_in_the_harness(kind: str) -> None:
    model, tokenizer = tiny_model(kind), tokenizer_of(kind)
    theirs = HFLM(model, tokenizer=tokenizer, batch_size=3, max_length=WINDOW)
    ours = PrunedHFLM(model, tokenizer, batch_size=3, max_length=WINDOW)
    expected, found = theirs.loglikelihood(requests("likelihood")), ours.loglikelihood(requests("likelihood"))
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    rolling = theirs.loglikelihood_rolling(requests("rolling"))
    assert ours.loglikelihood_rolling(requests("rolling")) == pytest.approx(rolling, abs=1e-3)


def test_greedy_continuations_are_recognised() -> None:
    model, tokenizer = tiny_model("byte_level"), tokenizer_of("byte_level")
    context = torch.tensor([tokenizer.encode(PAIRS[0][0])])
    following = model.generate(context, max_new_tokens=3, do_sample=False)[0, context.shape[1] :].tolist()
    ours = PrunedHFLM(model, tokenizer, batch_size=2, max_length=WINDOW)
    wrong = [(following[0] + 1) % 300, *following[1:]]
    answers = ours._loglikelihood_tokens([(None, context[0].tolist(), tokens) for tokens in (following, wrong)])
    assert [greedy for _, greedy in answers] == [True, False]


def pruned_model(kind: str) -> Any:
    model, tokenizer = tiny_model(kind), tokenizer_of(kind)
    ids = torch.tensor(tokenizer("\n".join(TEXT))["input_ids"][: 8 * WINDOW]).view(8, WINDOW)
    stats = calibrate(model, [{"input_ids": ids}], progress=False)
    prune_(model, ProbePruning(), stats, pruning_ratio=0.4, skip_layers=[0], round_to=8)
    return model


@pytest.mark.parametrize("kind", ["metaspace", "opt"])
def test_a_pruned_model_sees_which_tokens_are_padding(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    contexts = [tokenizer.encode(context) for context, _ in PAIRS[:2]]
    wholes = [tokenizer.encode(context + continuation) for context, continuation in PAIRS[:2]]
    long, short = (context + whole[len(context) :] for context, whole in zip(contexts, wholes, strict=True))
    ours = PrunedHFLM(pruned_model(kind), tokenizer, batch_size=2, max_length=WINDOW)
    answer = ours.loglikelihood(requests("likelihood")[:2])[1][0]

    ids = torch.tensor([long[:-1], short[:-1] + [0] * (len(long) - len(short))])
    mask = torch.tensor([[1] * (len(long) - 1), [1] * (len(short) - 1) + [0] * (len(long) - len(short))])
    start, masks = len(contexts[1]), (mask, torch.ones_like(mask))
    expected = [last_row_score(pruned_model(kind), ids, given, start, short) for given in masks]
    assert answer == pytest.approx(expected[0], abs=1e-4)
    assert answer != pytest.approx(expected[1], abs=1e-4)  # as the stock class would run it


@torch.no_grad()
def last_row_score(model: Any, ids: torch.Tensor, mask: torch.Tensor, start: int, tokens: list[int]) -> float:
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[-1, start - 1 : len(tokens) - 1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(tokens[start:])[:, None]).sum())


@pytest.mark.slow
def test_tasks_do_not_depend_on_one_another(tmp_path: Path) -> None:
    definitions = write_definitions(tmp_path, write_samples(tmp_path / "data"), limit=3)
    manager = TaskManager(include_path=str(definitions), include_defaults=False)
    model, tokenizer = pruned_model("metaspace"), tokenizer_of("metaspace")
    settings: dict[str, Any] = {"batch_size": 4, "max_length": WINDOW, "task_manager": manager}
    names = ["local_piqa", "local_arc_easy"]
    both = run_harness(model, tokenizer, names, **settings)
    alone = run_harness(model, tokenizer, names[1:], **settings)
    assert both["results"]["local_arc_easy"] == alone["results"]["local_arc_easy"]
    assert both["settings"] == {"batch_size": 4, "order": "by length, longest first", "max_length": WINDOW}
    with pytest.raises(UserError, match="no task 'local_nothing'"):
        run_harness(model, tokenizer, ["local_nothing"], **settings)


def test_a_variable_batch_size_is_refused() -> None:
    assert get_model("pp") is PrunedHFLM
    for size in ("auto", "auto:4", 0):
        with pytest.raises(UserError, match="give a number"):
            PrunedHFLM(tiny_model("opt"), tokenizer_of("opt"), batch_size=size)
    with pytest.raises(UserError, match="path=DIR"):
        PrunedHFLM()


@pytest.mark.parametrize("name", [None, "cuda:0", "cuda", "cpu"])
def test_without_a_gpu_it_runs_on_the_cpu(monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    """The harness names the first GPU by default."""
    asked: list[torch.device] = []

    class Loaded:
        def to(self, device: torch.device) -> Any:
            asked.append(device)
            return tiny_model("byte_level")

    monkeypatch.setattr(harness, "load_model", lambda *_: Loaded())
    monkeypatch.setattr(harness, "load_tokenizer", lambda *_: tokenizer_of("byte_level"))
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        PrunedHFLM(path="model", device=name)
    assert [device.type for device in asked] == ["cpu", "cpu" if name == "cpu" else "cuda"]


def write_checkpoint(folder: Path) -> Path:
    tiny_model("byte_level").save_pretrained(folder)
    tokenizer_of("byte_level").save_pretrained(folder)
    return folder


def test_it_loads_calibrates_and_prunes_what_model_args_name(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "' + "Plants turn sunlight into energy. " * 40 + '"}\n')
    arguments = {
        "path": str(write_checkpoint(tmp_path / "model")),
        "method": "pp",
        "pruning_ratio": 0.3,
        "skip_layers": 1,
        "round_to": 8,
    }
    ours = PrunedHFLM(
        batch_size=2, calibration=str(text), calibration_samples=4, max_length=WINDOW, device="cpu", **arguments
    )
    assert pruning_of(ours.model).method.label == "pp"
    assert pruning_of(ours.model).keep[1, Block.MLP] < ours.model.config.intermediate_size
    assert len(ours.loglikelihood(requests("likelihood"))) == len(PAIRS)
    with pytest.raises(UserError, match="there is no method 'magic'"):
        PrunedHFLM(**{**arguments, "method": "magic"})


def test_the_harness_command_refuses_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", GivenTasks)
    definitions = write_definitions(tmp_path, write_samples(tmp_path / "data"), limit=3)
    words = ["--tasks", "local_piqa", "--include_path", str(definitions), "--batch_size", "auto"]
    words += ["--model_args", f"path={write_checkpoint(tmp_path / 'model')}", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["harness", *words])
    with pytest.raises(UserError, match="give a number"):
        harness.main()


@pytest.mark.slow
def test_the_harness_command_has_the_model(tmp_path: Path) -> None:
    definitions = write_definitions(tmp_path, write_samples(tmp_path / "data"), limit=3)
    command = [sys.executable, "-m", "pp_lightning.commonsense.harness"]
    words = ["run", "--model", "pp", "--tasks", "local_piqa", "--include_path", str(definitions), "--device", "cpu"]
    words += ["--model_args", f"path={write_checkpoint(tmp_path / 'model')},max_length=64", "--batch_size", "4"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "local_piqa" in done.stdout
    refused = subprocess.run([*command, "--method"], capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stderr.splitlines()[-1]) == (2, "pp-lightning: --method needs a value")
