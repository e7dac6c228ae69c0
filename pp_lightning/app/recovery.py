"""Recovery training: a static method prunes, adapters train, and what is left is a small folder."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from pp_lightning.app.pictures import write_curve
from pp_lightning.calibration_data import CalibrationData, fingerprint
from pp_lightning.errors import UserError
from pp_lightning.families import layers_of, shape_of
from pp_lightning.methods import LoRAPrune, PruningMethod, StaticMethod
from pp_lightning.methods.base import StaticChoice
from pp_lightning.methods.recorded import Choices
from pp_lightning.parallel import is_sharded
from pp_lightning.plan import Amounts, make_plan
from pp_lightning.pruning import blocks_to_prune, is_pruned, prune_, pruning_of, unprune_
from pp_lightning.recovery import Adapters, GradualPruning, Recovery
from pp_lightning.recovery.folder import CHOICES
from pp_lightning.recovery.gradual import check_schedule
from pp_lightning.recovery.importances import gradients_of
from pp_lightning.stored import values_of
from pp_lightning.updating import LeastSquares

UNFINISHED = "unfinished.ckpt"  # what an interrupted training goes on from


class RecoveryRun:
    """One recovery training of one model, from the dense model to the folder and back.

    LoRAPrune removes units while its adapters train, and takes no part in ``allocation`` and ``floor``; every other
    static method prunes first. ``calibration_data`` and ``update`` give what the method chooses from, and how the
    weights that stay are updated, if they are.

    Attributes:
        gradual: LoRAPrune's masks, None for other methods.
        skipped: steps that were skipped because their gradients were not finite.
        losses: mean loss of each optimiser step (of this process's rows).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: PruningMethod | None,
        amounts: Amounts,
        recovery: Recovery,
        calibration_data: Callable[[PruningMethod], CalibrationData | None],
        update: Callable[[PruningMethod], LeastSquares | None],
        folder: Path,
        total_steps: int,
        seed: int,
    ) -> None:
        check_recovery(method, recovery, total_steps)
        assert isinstance(method, StaticMethod)
        self.model, self.method, self.recovery, self.folder = model, method, recovery, folder
        self.amounts = amounts
        self._described = described(method, amounts, recovery, total_steps)
        self.total_steps = total_steps
        self.skipped = 0
        self.losses: list[float] = []
        self.gradual: GradualPruning | None = None
        self._fingerprint = fingerprint(model)
        if isinstance(method, LoRAPrune):
            plan = make_plan(shape_of(model.config), method, amounts)
            blocks = blocks_to_prune(model, plan)
        else:
            prune_(model, method, calibration_data(method), **vars(amounts), update=update(method))
        self.adapters = Adapters(model, recovery.rank, recovery.alpha, recovery.dropout, seed)
        if isinstance(method, LoRAPrune):
            self.gradual = GradualPruning(self.adapters, blocks, method, total_steps)
        if recovery.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def optimizer(self) -> OptimizerLRScheduler:
        """AdamW on the adapters; linear warm-up, then linear to zero."""
        r = self.recovery
        optimizer = torch.optim.AdamW(self.adapters.parameters(), lr=r.learning_rate, weight_decay=r.weight_decay)
        schedule = get_linear_schedule_with_warmup(optimizer, r.warmup_steps, self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to go on: adapters, masks or choices, and whose they are."""
        return {
            "model": self._fingerprint,
            "about": self._described,
            "adapters": self.adapters.state(),
            "choices": self._choices().tensors(),
            "gradual": None if self.gradual is None else self.gradual.state(),
            "skipped": self.skipped,
            "losses": list(self.losses),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        if state["model"] != self._fingerprint:
            raise UserError(
                f"{self.folder / UNFINISHED} has adapters of another model: remove it or name another folder"
            )
        if state["about"] != self._described:
            raise UserError(f"{self.folder / UNFINISHED} has other settings: remove it or name another folder")
        if self.gradual is None and not _equal(self._choices().tensors(), state["choices"]):
            raise UserError(f"{self.folder / UNFINISHED} was pruned otherwise: remove it or name another folder")
        self.adapters.load(state["adapters"])
        if self.gradual is not None:
            self.gradual.load(state["gradual"])
        self.skipped, self.losses = state["skipped"], list(state["losses"])

    def save(self, *, writes: bool = True) -> None:
        """Write the folder: the pruned model's adapters, the loss curve, the choices.

        Args:
            writes: whether this process does; all of them give what they have of the adapters.
        """
        choices = self._choices()
        if self.gradual is None:
            state = self.adapters.state()
        else:
            shape = shape_of(self.model.config)
            plan = make_plan(shape, self.method, self.amounts)
            numbers = {block.block: block.units.number for block in plan.blocks}
            kept = {key: (choice.kept, numbers[key[1]]) for key, choice in choices.choices.items()}
            state = self.adapters.sliced_state(kept)
        if not writes:
            return
        (self.folder / CHOICES).unlink(missing_ok=True)  # of an earlier run: never beside adapters of this one
        self.adapters.save(self.folder, state)
        steps = range(1, len(self.losses) + 1)
        write_curve(self.losses, [1.0 if self.gradual is None else self.gradual.ratio(n) for n in steps], self.folder)
        choices.save(self.folder / CHOICES)  # last: with it the folder is complete

    def leave(self) -> None:
        """Give the dense model back, bit for bit; a sharded one does not come back."""
        if is_sharded(layers_of(self.model)[0]):
            return
        if self.recovery.gradient_checkpointing:
            self.model.gradient_checkpointing_disable()
        if self.gradual is not None:
            self.gradual.detach()
        self.adapters.detach()
        if is_pruned(self.model):
            unprune_(self.model)

    def _choices(self) -> Choices:
        about: dict[str, Any] = {**self._described, "method": self.method.label, "skipped_steps": self.skipped}
        if self.gradual is not None:
            return Choices(self._fingerprint, self.gradual.choices(), about)
        pruning = pruning_of(self.model)
        choices = {
            key: StaticChoice(kept, pruning.biases.get(key), pruning.columns.get(key))
            for key, kept in pruning.choices.items()
        }
        return Choices(self._fingerprint, choices, about)


def check_recovery(method: PruningMethod | None, recovery: Recovery, total_steps: int) -> None:
    """Refuse, before any work is done, a training that cannot end well."""
    if not isinstance(method, StaticMethod):
        raise UserError("recovery trains a statically pruned model: choose a static --model.method")
    if total_steps < 1:
        raise UserError("recovery needs to know its length: set --trainer.max_steps")
    if isinstance(method, LoRAPrune):
        check_schedule(method, total_steps)
    if recovery.warmup_steps >= total_steps:
        raise UserError(
            f"the learning rate warms up for {recovery.warmup_steps} of {total_steps} steps: "
            "lower --model.recovery.warmup_steps or train longer"
        )


def described(method: PruningMethod, amounts: Amounts, recovery: Recovery, steps: int) -> dict[str, dict[str, Any]]:
    """The settings of a recovery in plain types, as they come back from a file.

    What is recorded as ``amounts`` prunes with the recorded choice: a ranking over all layers skips none of them.
    """
    ranked = (amounts.allocation or method.allocation) == "global"
    about = {
        "settings": method.settings(),
        "amounts": amounts.recorded() | ({"skip_layers": []} if ranked else {}),
        "allocation": {name: getattr(amounts, name) for name in ("allocation", "floor", "skip_layers")},
        "recovery": asdict(recovery) | {"steps": steps},
    }
    plain: dict[str, dict[str, Any]] = json.loads(json.dumps(about))
    return plain


class RecoverySteps(Callback):
    """Drives a :class:`RecoveryRun`: skips steps without finite gradients, and removes units when it is time."""

    def __init__(self, run: Callable[[], RecoveryRun]) -> None:
        self.run = run
        self._finite = True  # whether the losses since the last step were
        self._loss = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_index: int) -> None:
        """Draw the same dropout in a continued run as in one that was never interrupted."""
        torch.manual_seed(hash((trainer.global_step, batch_index, trainer.global_rank)))

    def on_before_backward(self, trainer: L.Trainer, module: L.LightningModule, loss: Tensor) -> None:
        """Note a loss that is not finite; what to do is decided where all processes meet."""
        self._finite &= bool(loss.isfinite())

    def on_before_optimizer_step(
        self, trainer: L.Trainer, module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Skip the step, or take its gradients into the scores, clipped as the optimiser will see them."""
        run, step = self.run(), trainer.global_step + 1
        if not all(bool(values_of(gradient.isfinite().all())) for gradient in gradients_of(run.adapters)):
            self._check_loss(trainer, step)
            optimizer.zero_grad(set_to_none=True)
            run.skipped += 1
            if trainer.is_global_zero:
                print(f"step {step} skipped: its gradients are not finite ({run.skipped} skipped so far)", flush=True)
        elif run.gradual is not None:
            algorithm = trainer.gradient_clip_algorithm
            module.clip_gradients(optimizer, trainer.gradient_clip_val, None if algorithm is None else str(algorithm))
            run.gradual.after_gradients(step)
            module.log("pruned", run.gradual.ratio(step), prog_bar=True)
        module.log("skipped_steps", float(run.skipped))

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        """Keep the loss curve: Lightning has divided each loss by the number of batches in a step."""
        self._loss += float(outputs["loss"])
        if trainer.global_step > len(self.run().losses):
            self.run().losses.append(self._loss)
            self._loss = 0.0

    def _check_loss(self, trainer: L.Trainer, step: int) -> None:
        bad = trainer.strategy.reduce(torch.tensor(float(not self._finite)), reduce_op="sum")
        if float(bad) > 0:
            kept = self.run().folder / UNFINISHED
            hint = f"; {kept.name} in --out has the last good state" if kept.exists() else ""
            raise UserError(f"the loss is not finite at step {step}: lower the learning rate or use bfloat16{hint}")

    def state_dict(self) -> dict[str, Any]:
        """Everything of the run, for the checkpoint."""
        return self.run().state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.run().load(state_dict)


def recovery_callbacks(
    run: Callable[[], RecoveryRun], folder: Path, recovery: Recovery, *, saves: bool = True
) -> list[Callback]:
    """The steps of a recovery, and its latest state in one file, replaced only when the new one is complete.

    Without ``saves`` there is no such file: one process has not all of a sharded model.
    """
    if not saves:
        return [RecoverySteps(run)]
    latest = ModelCheckpoint(
        dirpath=folder,
        filename=UNFINISHED.removesuffix(".ckpt"),
        every_n_train_steps=recovery.save_every,
        enable_version_counter=False,
        save_on_train_epoch_end=False,
    )
    return [RecoverySteps(run), latest]


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
