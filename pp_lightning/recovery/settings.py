"""How a pruned model is fine-tuned: the published settings are the defaults."""

from dataclasses import dataclass

from pp_lightning.errors import UserError


@dataclass(frozen=True)
class Recovery:
    """Low-rank adapters on every projection of every layer, and how they are trained (LLM-Pruner's recovery).

    Attributes:
        rank: r, the inner width of an adapter ``B A``.
        alpha: adapters are scaled by ``alpha / rank``.
        dropout: share of an adapter's inputs that is dropped while training.
        learning_rate: peak learning rate of AdamW; linear warm-up, then linear to zero at the last step.
        warmup_steps: optimiser steps of linear warm-up.
        weight_decay: AdamW's decoupled weight decay.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        save_every: optimiser steps between two checkpoints to go on from after an interruption.
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.05
    learning_rate: float = 1e-4
    warmup_steps: int = 100
    weight_decay: float = 0.0
    gradient_checkpointing: bool = False
    save_every: int = 20

    def check(self) -> None:
        """Refuse impossible settings."""
        if self.rank < 1 or self.save_every < 1 or self.alpha <= 0 or not 0.0 <= self.dropout < 1.0:
            raise UserError("recovery needs a rank and save_every of at least 1, a positive alpha, a dropout in [0, 1)")
        if min(self.learning_rate, self.warmup_steps, self.weight_decay) < 0:
            raise UserError("recovery needs a learning_rate, warmup_steps and a weight_decay from 0")
