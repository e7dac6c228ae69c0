"""Running a recovery training to its end, or to where it can go on."""

from pathlib import Path

import lightning as L

from pp_lightning.app.module import PrunedLM
from pp_lightning.app.recovery import UNFINISHED
from pp_lightning.data.base import EvaluationData
from pp_lightning.errors import UserError
from pp_lightning.recovery import Recovered, Recovery


def train_recovery(trainer: L.Trainer, model: PrunedLM, data: EvaluationData) -> None:
    """Train the adapters of ``model`` into the trainer's folder, and leave the dense model behind.

    An interrupted training leaves a checkpoint there, and goes on from it when it is started again.
    """
    unfinished = Path(trainer.default_root_dir) / UNFINISHED
    complete = False
    try:
        trainer.fit(
            model, datamodule=data, ckpt_path=str(unfinished) if unfinished.exists() else None, weights_only=True
        )
        complete = True
    finally:
        model.end_recovery(save=complete)
    if trainer.is_global_zero:
        unfinished.unlink(missing_ok=True)


def check_same(recovered: Recovered, model: PrunedLM, recovery: Recovery, steps: int, folder: Path) -> None:
    """Refuse a recovered model that was trained with other settings than are asked for now."""
    about, wanted = recovered.choices.about, model.recovery_settings(recovery, steps)
    for name, value in wanted.items():
        if {key: about.get(name, {}).get(key) for key in value} != value:
            raise UserError(f"{folder} was trained with other {name}: remove it or name another --out")
