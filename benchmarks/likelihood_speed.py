"""Likelihood scoring of a dense model: ours against lm-evaluation-harness's HFLM, on the same rows and batch size.

Both are given the same questions as text, and tokenise, batch and score them; one run of each, in turn, in one process.
Needs the extra ``eval``.

    python benchmarks/likelihood_speed.py --model.path DIR --data DIR/commonsense --limit 50
"""

import argparse
import logging
import platform
import statistics
import time
from collections.abc import Callable

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pp_lightning.checkpoints import load_model, load_tokenizer
from pp_lightning.commonsense import TASK_NAMES, CommonsenseData, score_batch


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model.path", dest="path", help="transformers folder; none takes the embedded model")
    parser.add_argument("--data", required=True, help="folder with one folder a task in it")
    parser.add_argument("--tasks", nargs="+", default=list(TASK_NAMES))
    parser.add_argument("--limit", type=int, help="rows of each task")
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; none leaves torch's choice")
    return parser.parse_args()


def ours(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str, options: argparse.Namespace
) -> Callable[[], list[float]]:
    read_once = data_of(task, options)
    questions = read_once.questions(task)

    def run() -> list[float]:
        data = data_of(task, options)
        data._questions[task] = questions  # reading files is no part of the comparison
        data.use_tokenizer(tokenizer)
        return [
            score for batch in data.test_batches(task) for score in score_batch(model, batch).log_likelihood.tolist()
        ]

    return run


def harness(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str, options: argparse.Namespace
) -> Callable[[], list[float]]:
    language_model = HFLM(model, tokenizer=tokenizer, batch_size=options.batch_size, max_length=options.window)
    pairs = [
        pair
        for question in data_of(task, options).questions(task)
        for pair in zip(question.contexts, question.continuations, strict=True)
    ]

    def run() -> list[float]:
        requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
        return [score for score, _ in language_model.loglikelihood(requests, disable_tqdm=True)]

    return run


def data_of(task: str, options: argparse.Namespace) -> CommonsenseData:
    return CommonsenseData(
        options.data, [task], window=options.window, batch_size=options.batch_size, limit=options.limit
    )


def seconds(run: Callable[[], list[float]]) -> tuple[float, float]:
    """Wall time, and the sum of scores as a check that both did the same work."""
    start = time.perf_counter()
    total = sum(run())
    return time.perf_counter() - start, total


def main() -> None:
    options = arguments()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if options.threads:
        torch.set_num_threads(options.threads)
    tokenizer = load_tokenizer(options.path, "</s>")
    model = load_model(options.path, options.dtype).to(options.device)
    device = torch.cuda.get_device_name() if model.device.type == "cuda" else platform.machine()
    print(f"{options.path}: {options.dtype} on {model.device} ({device}), {torch.get_num_threads()} CPU threads,")
    print(f"batches of {options.batch_size} rows, window {options.window}, {options.repeats} runs each, in turn")
    print(f"{'task':14} {'ours (s)':>22} {'HFLM (s)':>22} {'HFLM / ours':>12}")
    sums: list[list[float]] = [[0.0] * options.repeats, [0.0] * options.repeats]
    for task in options.tasks:
        runs = [maker(model, tokenizer, task, options) for maker in (ours, harness)]
        totals = [seconds(run)[1] for run in runs]  # warm-up
        if options.dtype == "float32":
            assert abs(totals[0] - totals[1]) <= 1e-5 * abs(totals[1]), f"{task}: the two do not score the same"
        times: list[list[float]] = [[], []]
        for repeat in range(options.repeats):
            for index, run in enumerate(runs):
                times[index].append(seconds(run)[0])
                sums[index][repeat] += times[index][-1]
        print(line(task, times), flush=True)
    print(line("all", sums))


def line(name: str, times: list[list[float]]) -> str:
    cells = [f"{statistics.median(t):.3f} [{min(t):.3f}, {max(t):.3f}]" for t in times]
    ratio = statistics.median(times[1]) / statistics.median(times[0])
    return f"{name:14} {cells[0]:>22} {cells[1]:>22} {ratio:>12.2f}"


if __name__ == "__main__":
    main()
