r"""Any task of lm-evaluation-harness on a pruned model (extra ``eval``).

In Python, :func:`run_harness`. On the command line, lm_eval 0.4.13 has no plug-ins for models (``--include_path`` finds
tasks only), so its command is started through this module, which adds the model ``pp`` to it. ``pp-lightning lm-eval``
puts ``run --model pp`` in front of options; ``python -m pp_lightning.commonsense.harness`` is the same::

    pp-lightning lm-eval --batch_size 20 --tasks hellaswag \
        --model_args path=DIR,method=pp,pruning_ratio=0.4,statistics=FILE.safetensors

**What the harness's order does to batch-wise choices.** It collects the requests of all tasks of a run, sorts them by
length, longest first, and cuts the sorted list into batches. Rows of one question then fall into different batches, and
a batch mixes questions, even tasks. A dynamic method chooses units for such a batch, and its history moves from the
longest to the shortest texts, so the numbers depend on the batch size and on which tasks run together. The batch size
is therefore fixed (``auto`` is refused) and stored with the results, and :func:`run_harness` runs one task at a time,
each from the same histories. Dense and statically pruned models do not depend on any of it. The choice is made
on whole rows here: ``choose_on=context`` is for ``--data commonsense``, whose batches hold whole questions.
"""

import sys
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, cast

import lm_eval
import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pp_lightning.calibration import calibrate
from pp_lightning.calibration_data import CalibrationData
from pp_lightning.checkpoints import Dtype, load_model, load_tokenizer
from pp_lightning.commonsense.batching import collate_rows
from pp_lightning.commonsense.encoding import EncodedRow, encoded_row
from pp_lightning.commonsense.harness_words import with_model_args
from pp_lightning.commonsense.scoring import score_tokens, sum_rows
from pp_lightning.data.base import samples_for
from pp_lightning.data.windows import batched, document_windows
from pp_lightning.errors import UserError, unknown
from pp_lightning.importances import Importances
from pp_lightning.methods import PruningMethod, method_named
from pp_lightning.methods.gradient import GradientMethod
from pp_lightning.progress import shown
from pp_lightning.pruning import prune_
from pp_lightning.recovery import Recovered
from pp_lightning.state import load_pruning_state, pruning_state
from pp_lightning.statistics import Statistics
from pp_lightning.texts import C4, source_named

_CALIBRATION_WINDOW, _CALIBRATION_ROWS = 512, 20  # the paper's, for tasks

_Request = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("pp")
class PrunedHFLM(HFLM):
    """The harness's model class, for pruned models.

    Likelihood requests are tokenised, sorted and batched as ``HFLM`` does, but padding is masked, which a probe must
    know, and the vocabulary projection is applied to continuations only.

    Args:
        pretrained: a model that is loaded already, dense or pruned; needs ``tokenizer``. None loads ``path``.
        tokenizer: its tokenizer.
        batch_size: rows of a batch, always a number.
        max_length: window in tokens; None takes the model's whole length, or the positions that the statistics cover.
        path: a transformers folder or hub id, loaded and pruned here.
        method: label of a pruning method (``pp``, ``flap``, ``wanda_sp``, ...); None leaves the model dense.
        pruning_ratio: fraction of units removed over the whole model.
        skip_layers: the first layers, left dense.
        round_to: MLP channels are kept in multiples of this.
        statistics: a file written by ``calibrate``; None calibrates on ``calibration``.
        importances: a file of importances, which LLM-Pruner and LoRAPrune choose from: ``pp-lightning test`` with
            ``--model.importances FILE`` writes one.
        recovered: a folder that ``pp-lightning fit`` with recovery wrote from ``path``, adapters merged here. It brings
            its method, ratio and layers.
        calibration: a text by its name: a file, a data set of the hub, or a class; None takes C4 from the hub.
        calibration_samples: windows to calibrate on, each ``max_length`` (or 512) long; None takes 512 on an
            accelerator and 64 on a CPU.
        pad_token: a token to pad with, for tokenizers that define none.
        dtype: of the weights.
        device: where the model runs.
        **settings: passed on to :class:`HFLM`.

    Raises:
        UserError: ``batch_size`` is not a number, neither a model nor a path is given, or the model cannot be loaded or
            pruned.
    """

    def __init__(
        self,
        pretrained: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_size: int | str = 1,
        max_length: int | None = None,
        path: str | None = None,
        method: str | None = None,
        pruning_ratio: float = 0.4,
        skip_layers: int = 3,
        round_to: int = 64,
        statistics: str | None = None,
        importances: str | None = None,
        recovered: str | None = None,
        calibration: str | None = None,
        calibration_samples: int | None = None,
        pad_token: str | None = None,
        dtype: Dtype = "auto",
        device: str | None = None,
        **settings: Any,
    ) -> None:
        _check_names(settings)
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"batch_size={batch_size}: give a number, since dynamic pruning chooses per batch")
        if pretrained is None:
            if path is None:
                raise UserError("name the model: --model_args path=DIR")
            if recovered is not None and method is not None:
                raise UserError("recovered brings its own method: leave out method")
            policy = None if method is None else _policy(method, importances)
            trained = None if recovered is None else Recovered.load(recovered)
            tokenizer = load_tokenizer(path, pad_token)
            pretrained = load_model(path, dtype).to(_device(device))
            if trained is not None:
                prune_(pretrained, trained.method, trained.choices, **trained.amounts)
                trained.attach(pretrained).merge()
            elif policy is not None:
                found: CalibrationData
                if isinstance(policy, GradientMethod):
                    assert importances is not None
                    found = Importances.load(importances)
                else:
                    found = _statistics(pretrained, tokenizer, statistics, calibration, calibration_samples, max_length)
                    max_length = max_length or found.num_positions
                prune_(
                    pretrained,
                    policy,
                    found,
                    pruning_ratio=pruning_ratio,
                    skip_layers=range(skip_layers),
                    round_to=round_to,
                    release_stats=True,
                )
        self.choices: dict[str, Any] = {
            "batch_size": int(batch_size),
            "order": "by length, longest first",
            "max_length": max_length,
        }
        super().__init__(
            pretrained=pretrained, tokenizer=tokenizer, batch_size=int(batch_size), max_length=max_length, **settings
        )

    def get_model_info(self) -> dict[str, Any]:
        """What the harness stores about the model, with what batch-wise choices depend on."""
        return {**super().get_model_info(), "pp_lightning": self.choices}

    def _loglikelihood_tokens(
        self, requests: list[_Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Sums of log-probabilities, and whether greedy decoding would have produced the continuation.

        ``override_bs``, from the harness's rolling log-likelihood, is not used: the batch size is fixed.
        """
        rows = [
            encoded_row(context, continuation, self.max_length, "a request") for _, context, continuation in requests
        ]
        answers: dict[int, tuple[float, bool]] = {}
        batches = _batches_by_length(rows, self.choices["batch_size"])
        for indices in shown(batches, "scoring", "batch", not disable_tqdm and self.rank == 0):
            for index, answer in zip(indices, self._answers([rows[i] for i in indices]), strict=True):
                answers[index] = answer
                if requests[index][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
        return [answers[index] for index in range(len(requests))]

    def _answers(self, rows: Sequence[EncodedRow]) -> list[tuple[float, bool]]:
        batch = collate_rows(rows, pad_id=0)
        log_probabilities, hits = score_tokens(self.model, batch, greedy=True)
        assert hits is not None
        scores = sum_rows(batch, log_probabilities)
        hit_counts = torch.bincount(batch["target_row"][hits], minlength=len(rows))
        return list(zip(scores.log_likelihood.tolist(), (hit_counts == scores.tokens).tolist(), strict=True))


def run_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    batch_size: int,
    max_length: int | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    task_manager: TaskManager | None = None,
) -> dict[str, Any]:
    """Run tasks of the harness on a model, dense or pruned, each from the histories that the model has now.

    Tasks run one at a time and the histories are put back after each, so a task's result does not depend on the others;
    see this module on what the harness's order does to batch-wise choices. ``max_length`` is the window in tokens
    (None: the model's whole length), at most what the statistics cover. ``TaskManager(include_path=DIR)`` finds tasks
    of your own.

    Returns:
        ``results`` (as the harness has them, by task), ``versions``, ``n-samples``, and ``settings``: batch size,
        window and order, which a dynamic method's numbers depend on.

    Raises:
        UserError: there is no such task, ``batch_size`` is not positive, or logits are not finite.
    """
    manager = task_manager or TaskManager()
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise UserError(f"lm-evaluation-harness has no task {unknown[0]!r}: `lm_eval ls tasks` lists them")
    language_model = PrunedHFLM(model, tokenizer, batch_size, max_length)
    state = pruning_state(model)
    merged: dict[str, Any] = {"results": {}, "versions": {}, "n-samples": {}, "settings": language_model.choices}
    for task in tasks:
        try:
            found = lm_eval.simple_evaluate(
                language_model, tasks=[task], limit=limit, num_fewshot=num_fewshot, task_manager=manager
            )
        finally:
            load_pruning_state(model, state)
        for part in ("results", "versions", "n-samples"):
            merged[part].update(found[part])
    return merged


def main() -> None:
    """``lm_eval``'s own command, with the model ``pp``: on its own, and behind ``pp-lightning lm-eval``."""
    if len(sys.argv) > 1 and sys.argv[1].startswith("--"):
        sys.argv[1:] = ["run", "--model", "pp", *with_model_args(sys.argv[1:])]
    cli_evaluate()


def _batches_by_length(rows: Sequence[EncodedRow], batch_size: int) -> list[list[int]]:
    """Indices of rows by batch: ``batch_size`` different inputs each, longest first, with all rows that share them."""
    sharing: dict[tuple[int, ...], list[int]] = {}
    for index, row in enumerate(rows):
        sharing.setdefault(row.inputs, []).append(index)
    inputs = sorted(sharing, key=lambda tokens: (-len(tokens), tokens))
    parts = [inputs[start : start + batch_size] for start in range(0, len(inputs), batch_size)]
    return [[index for tokens in part for index in sharing[tokens]] for part in parts]


def _statistics(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    file: str | None,
    calibration: str | None,
    samples: int | None,
    window: int | None,
) -> Statistics:
    if file is not None:
        return Statistics.load(file)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, verbose=False)["input_ids"])

    source = C4() if calibration is None else source_named(calibration)
    number = samples or samples_for(model.device)
    windows = document_windows(source.documents(), encode, window or _CALIBRATION_WINDOW, number, seed=0)
    batches = batched(windows, _CALIBRATION_ROWS, int(tokenizer.pad_token_id or 0))
    return calibrate(model, cast(list[Mapping[str, torch.Tensor]], batches))


def _policy(method: str, importances: str | None) -> PruningMethod:
    policy = method_named(method)
    if policy.updates:
        raise UserError(f"{method} updates weights: write a folder with pp-lightning prune, and name that as path")
    if isinstance(policy, GradientMethod) and importances is None:
        raise UserError(f"{method} chooses from importances: name their file, importances=FILE.safetensors")
    return policy


def _check_names(settings: Mapping[str, Any]) -> None:
    """Refuse arguments that neither this class nor the harness's knows; the latter would take no notice of them."""
    known = {*signature(PrunedHFLM).parameters, *signature(HFLM).parameters} - {"settings", "kwargs"}
    for name in settings:
        if name not in known:
            raise unknown("setting in model_args", name, sorted(known))


def _device(name: str | None) -> torch.device:
    """The device of this name. lm-evaluation-harness names the first GPU where nothing was said, GPU or not."""
    there = torch.cuda.is_available()
    if name is None or (name.startswith("cuda") and not there):
        return torch.device("cuda" if there else "cpu")
    return torch.device(name)


if __name__ == "__main__":
    try:
        main()
    except UserError as mistake:
        sys.stderr.write(f"pp-lightning: {mistake}\n")
        sys.exit(2)
