"""Fine-tuning a pruned model with low-rank adapters, and pruning by their gradients. Needs peft."""

from pp_lightning.recovery.adapters import Adapters
from pp_lightning.recovery.folder import Recovered
from pp_lightning.recovery.gradual import GradualPruning
from pp_lightning.recovery.importances import lora_importances
from pp_lightning.recovery.settings import Recovery

__all__ = ["Adapters", "GradualPruning", "Recovered", "Recovery", "lora_importances"]
