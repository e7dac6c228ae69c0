"""The LightningModule: a causal language model, trained dense or evaluated pruned."""

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from pp_lightning.checkpoints import Dtype, load_model, load_tokenizer, new_model
from pp_lightning.data.windows import Batch


class PrunedLM(L.LightningModule):
    """A causal language model.

    Args:
        path: a transformers checkpoint folder or hub id; none takes the small model that comes with the package.
        dtype: dtype of the weights; ``auto`` keeps the checkpoint's own.
        pad_token: a token to pad with, for tokenizers that define none (LLaMA: ``</s>``).
        allow_pickle: also load ``.bin`` checkpoints, which can run code of whoever wrote them.
        from_scratch: take only the config and tokenizer from ``path`` and draw new weights.
        learning_rate: peak learning rate of ``fit`` (AdamW, linear warm-up, cosine decay).
        warmup_steps: optimiser steps of linear warm-up.
        weight_decay: AdamW's decoupled weight decay.
    """

    def __init__(
        self,
        path: str | None = None,
        dtype: Dtype = "float32",
        pad_token: str | None = None,
        allow_pickle: bool = False,
        from_scratch: bool = False,
        learning_rate: float = 1e-3,
        warmup_steps: int = 100,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__()
        self.path = path
        self.dtype_name = dtype
        self.pad_token = pad_token
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.weight_decay = weight_decay
        self.tokenizer = load_tokenizer(path, pad_token)
        self.model = new_model(path) if from_scratch else load_model(path, dtype, allow_pickle=allow_pickle)

    def setup(self, stage: str) -> None:
        """Hand the tokenizer to the data module."""
        self.trainer.datamodule.use_tokenizer(self.tokenizer)  # type: ignore[attr-defined]

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Mean next-token cross-entropy of one batch."""
        loss: Tensor = self.model(**batch, use_cache=False).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Held-out loss, averaged over predicted tokens."""
        loss = self.model(**batch, use_cache=False).loss
        predicted = int((batch["labels"][:, 1:] >= 0).sum())
        self.log("val_loss", loss, prog_bar=True, batch_size=predicted, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with decay on matrices only; linear warm-up, then cosine to zero at the last step."""
        decayed = [p for p in self.model.parameters() if p.requires_grad and p.dim() >= 2]
        plain = [p for p in self.model.parameters() if p.requires_grad and p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.95))
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_cosine_schedule_with_warmup(optimizer, self.warmup_steps, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
