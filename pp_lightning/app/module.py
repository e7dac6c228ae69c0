"""The LightningModule: a causal language model, trained dense or evaluated pruned."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from pp_lightning.app.forecast import Forecast
from pp_lightning.app.prunable import PrunableModule
from pp_lightning.app.recovery import RecoveryRun, described, recovery_callbacks
from pp_lightning.app.results import Evaluation
from pp_lightning.app.scoring import Scoring, scoring_for
from pp_lightning.app.settings import PruningSettings
from pp_lightning.app.spreading import spread, spreads
from pp_lightning.checkpoints import Dtype, load_tokenizer, new_model, open_model, usual_dtype
from pp_lightning.commonsense import CommonsenseData
from pp_lightning.compilation import Compilation, compile_, uncompile_
from pp_lightning.data.base import EvaluationData
from pp_lightning.data.datamodule import LanguageModelling
from pp_lightning.data.windows import Batch
from pp_lightning.errors import UserError
from pp_lightning.families import longest_text
from pp_lightning.methods import PruningMethod, StaticMethod
from pp_lightning.progress import write_line
from pp_lightning.pruning import is_pruned
from pp_lightning.recovery import Recovered, Recovery
from pp_lightning.state import skipped_batches

_DEFAULT_RATIO = 0.2
_DEFAULT_SKIPPED = (0, 1, 2)


class PrunedLM(PrunableModule):
    """A causal language model and how to prune it.

    Args:
        path: a transformers checkpoint folder or hub id; none takes the small model that comes with the package.
        method: the pruning method of ``test``; none evaluates the dense model. ``compare`` names its own.
        pruning_ratio: fraction of heads and MLP channels removed over the whole model, in [0, 1); none takes 0.2, or
            that of ``recovered``.
        skip_layers: layers left dense; the others lose more to make up for them. None takes the first three, as
            published.
        dtype: dtype of the weights; none and ``auto`` keep the checkpoint's own. The small model that comes with the
            package is run in float32.
        pad_token: a token to pad with, for tokenizers that define none (LLaMA: ``</s>``).
        compile: compile every layer, dense ones too: saved arithmetic becomes saved time. The first batch pays for it.
        allow_pickle: also load ``.bin`` checkpoints, which can run code of whoever wrote them.
        stream: leave the weights of the layers on disk, and give each layer its own while it runs, for models larger
            than the memory; none does so where they would take more than half of the free memory.
        from_scratch: take only the config and tokenizer from ``path`` and draw new weights.
        learning_rate: peak learning rate of ``fit`` (AdamW, linear warm-up, cosine decay).
        warmup_steps: optimiser steps of linear warm-up.
        weight_decay: AdamW's decoupled weight decay.
        recovery: fine-tune the model pruned by a static ``method`` with low-rank adapters, instead of training all
            weights of the dense model; with settings of its own. Needs peft.
        recovered: a folder that ``fit`` with ``recovery`` wrote: evaluate that model, adapters merged. It brings its
            method and ratios.
        **settings: all others of :class:`~pp_lightning.app.settings.PruningSettings`.
    """

    def __init__(
        self,
        path: str | None = None,
        method: PruningMethod | None = None,
        pruning_ratio: float | None = None,
        skip_layers: list[int] | None = None,
        dtype: Dtype | None = None,
        pad_token: str | None = None,
        compile: bool = False,
        allow_pickle: bool = False,
        stream: bool | None = None,
        from_scratch: bool = False,
        learning_rate: float = 1e-3,
        warmup_steps: int = 100,
        weight_decay: float = 0.1,
        recovery: Recovery | None = None,
        recovered: str | None = None,
        **settings: Any,
    ) -> None:
        if stream and (from_scratch or compile or allow_pickle):
            raise UserError("weights that stay on disk are not drawn, compiled or pickled: leave stream out")
        super().__init__(
            new_model(path)
            if from_scratch
            else open_model(path, dtype or usual_dtype(path), allow_pickle=allow_pickle, stream=stream),
            method,
            PruningSettings(
                _DEFAULT_RATIO if pruning_ratio is None else pruning_ratio,
                skip_layers=_DEFAULT_SKIPPED if skip_layers is None else tuple(skip_layers),
                **settings,
            ),
        )
        self.path = path
        self._dtype: Dtype = dtype or usual_dtype(path)
        self._is_spread = False
        self.tokenizer = load_tokenizer(path, pad_token)
        self.compiles = compile
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.weight_decay = weight_decay
        self.recovery = recovery
        self.evaluation: Evaluation | None = None
        self._scoring: Scoring | None = None
        self._forecast: Forecast | None = None
        self._compilation: Compilation | None = None
        self._run: RecoveryRun | None = None
        if recovery is not None:
            recovery.check()
        if recovered is not None:
            if method is not None:
                raise UserError("recovered brings its own method: leave out --model.method")
            found = Recovered.load(recovered)
            trained_at = found.amounts["pruning_ratio"]
            if pruning_ratio not in (None, trained_at):
                raise UserError(f"{recovered} was trained at ratio {trained_at}: leave out --model.pruning_ratio")
            self.use_recovered(found)

    @property
    def data(self) -> EvaluationData:
        """The trainer's data module."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, EvaluationData)
        return data

    def setup(self, stage: str) -> None:
        """Get ready for the trainer's data."""
        self.prepare(self.data)
        if stage == "fit" and self.is_streamed:
            raise UserError("training needs all weights in memory: say --model.stream false, or take a smaller model")
        if stage == "fit" and self.recovery is not None:
            self._start_recovery(self.recovery)

    def prepare(self, data: EvaluationData) -> None:
        """Hand the tokenizer to the data module, and check before any work what can be checked."""
        data.use_tokenizer(self.tokenizer, self.model.get_input_embeddings().num_embeddings)
        data.suit(longest_text(self.model.config), self.trainer.strategy.root_device)
        if isinstance(data, CommonsenseData):
            data.check_refresh(self.settings.refresh)
        self.check_plan(self.method, data.window)

    def configure_model(self) -> None:
        """Spread the model over processes, where the strategy says so; once, however often Lightning asks."""
        if not self._is_spread:
            self._is_spread = True
            spread(self, self.data, self.path, self._dtype)

    def on_test_start(self) -> None:
        """Prune, with all that it takes."""
        self.evaluation = None
        if self.method is not None and not is_pruned(self.model):
            self.prune(self.data)
        self._compilation = compile_(self.model) if self.compiles else None
        progress = getattr(self.trainer.progress_bar_callback, "show", None)  # Lightning's own have no such room
        resume_file = self.out / f"unfinished-{self.label}-{self.settings.pruning_ratio}.json"
        told = self.tell if self.is_streamed else None
        self._scoring = scoring_for(self.data, self.model, told, resume_file, progress)
        self._forecast = self._evaluation_forecast()

    def _evaluation_forecast(self) -> Forecast | None:
        """For a text, which has one batch after the other; tasks show their own progress."""
        if not isinstance(self.data, LanguageModelling) or not self.trainer.is_global_zero:
            return None
        (batches,) = self.trainer.num_test_batches
        tokens = int(batches) * self.data.batch_size * self.data.window * self.trainer.world_size
        name = "dense" if self.method is None else f"{self.label} at {self.settings.pruning_ratio:g}"
        return Forecast(f"evaluating {name}", "--data.limit_tokens", tokens, int(batches), write_line, self.model)

    def test_step(self, batch: Any, batch_index: int) -> None:
        """Score one batch."""
        assert self._scoring is not None
        self._scoring.step(self.model, batch)
        if self._forecast is not None:
            self._forecast.batch_done()

    def on_test_epoch_end(self) -> None:
        """Sum up, and log the figures that are single numbers."""
        assert self._scoring is not None
        self._scoring.finish(self.model)
        skipped_batches(self.model)  # on an accelerator nobody has looked yet
        self.evaluation = Evaluation(
            method=self.label,
            pruning_ratio=self.settings.pruning_ratio if self.method else 0.0,
            flops=self._scoring.flops_ratios(),
            kept=self.kept_counts(),
            settings=self.method_settings(),
            compiled=None if self._compilation is None else self._compilation.as_dict(),
            **self._scoring.figures(),
        )
        self.log_dict(self.evaluation.single_numbers(), rank_zero_only=True)

    def on_test_end(self) -> None:
        """Leave the dense model behind where more rows follow."""
        if self._compilation is not None:
            uncompile_(self.model)
        self.restore()

    def on_fit_start(self) -> None:
        """Train in training mode: checkpoints are loaded for evaluation."""
        self.model.train()

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Mean next-token cross-entropy of one batch."""
        loss: Tensor = self.model(**batch, use_cache=False).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Held-out loss, averaged over predicted tokens."""
        loss = self.model(**batch, use_cache=False).loss
        predicted = int((batch["labels"][:, 1:] >= 0).sum())
        loss = loss if predicted else torch.zeros_like(loss)  # run for the sake of other processes
        self.log("val_loss", loss, prog_bar=True, batch_size=predicted, sync_dist=True)

    def configure_callbacks(self) -> list[Callback]:
        """With recovery: the steps that it takes, and a checkpoint to go on from."""
        if self.recovery is None:
            return []
        saves = not spreads(self.trainer.strategy)
        return recovery_callbacks(self.run, self.out, self.recovery, saves=saves)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """With recovery, a checkpoint has adapters and masks only; they are in its callback's state."""
        if self.recovery is not None:
            checkpoint["state_dict"] = {}

    @property
    def out(self) -> Path:
        """The output folder."""
        return Path(self.trainer.default_root_dir)

    def run(self) -> RecoveryRun:
        """The recovery training that is under way."""
        assert self._run is not None, "only while fit runs with recovery"
        return self._run

    def end_recovery(self, save: bool) -> None:
        """Give the dense model back, after writing the result if it is complete."""
        run, self._run, done = self._run, None, self.trainer.global_step
        if run is None:
            return
        try:
            if save and done < run.total_steps:
                raise UserError(f"the training stopped at step {done} of {run.total_steps}: run it again to go on")
            if save:
                run.save(writes=self.trainer.is_global_zero)
        finally:
            run.leave()

    def recovery_settings(self, recovery: Recovery, steps: int) -> dict[str, dict[str, Any]]:
        """What a recovery with the present method and ratios would keep about itself, in plain types."""
        assert self.method is not None
        return described(self._trained(self.method), self.amounts, recovery, steps)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """With recovery its own; else AdamW with decay on matrices only, linear warm-up, then cosine to zero."""
        if self._run is not None:
            return self._run.optimizer()
        decayed = [p for p in self.model.parameters() if p.requires_grad and p.dim() >= 2]
        plain = [p for p in self.model.parameters() if p.requires_grad and p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.95))
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_cosine_schedule_with_warmup(optimizer, self.warmup_steps, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _start_recovery(self, recovery: Recovery) -> None:
        """Prune, or get ready to, and attach adapters: before the optimiser is made and a checkpoint is read."""
        if self.recovered is not None:
            raise UserError("fit starts from the dense model: leave out --model.recovered")
        limit = longest_text(self.model.config)
        if self.data.train_window > limit:
            asked = f"training windows of {self.data.train_window} tokens"
            raise UserError(f"{asked} exceed the model's {limit} positions: lower the window of --data.train")
        self.model.to(self.trainer.strategy.root_device)
        self.strict_loading = False  # a checkpoint has no dense weights
        self._run = RecoveryRun(
            self.model,
            None if self.method is None else self._trained(self.method),
            self.amounts,
            recovery,
            partial(self.calibration_data_for, data=self.data),
            partial(self.update_for, data=self.data),
            self.out,
            total_steps=self.trainer.max_steps,
            seed=self.data.seed,
        )

    def _trained(self, method: PruningMethod) -> PruningMethod:
        """The method as ``uniform`` and ``update`` want it; a choice per batch is not trained, frozen or not."""
        return self.settled(method) if isinstance(method, StaticMethod) else method
