"""What recovery leaves behind: the choices and the adapters of the pruned model, in one small folder."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from pp_lightning.errors import UserError
from pp_lightning.methods.recorded import Choices, Recorded
from pp_lightning.recovery.adapters import Adapters

CHOICES = "choices.safetensors"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Recovered:
    """A model that was pruned and fine-tuned, as its difference from the dense one.

    Attributes:
        choices: the units that stay; ``about`` has the method, its settings and the ratios.
        adapter: A and B of the pruned model's projections, by peft's names.
        alpha: their scale times r.
    """

    choices: Choices
    adapter: Mapping[str, Tensor]
    rank: int
    alpha: float

    @staticmethod
    def load(folder: str | Path) -> "Recovered":
        """Read a folder written by ``pp-lightning fit``.

        Raises:
            UserError: it is not complete, or not one of ours.
        """
        place = Path(folder)
        for name in (CHOICES, ADAPTER_CONFIG, ADAPTER):
            if not (place / name).is_file():
                raise UserError(f"{folder} has no {name}: give the folder that a finished fit with recovery wrote")
        try:
            settings = json.loads((place / ADAPTER_CONFIG).read_text())
            adapter = load_file(place / ADAPTER)
            return Recovered(Choices.load(place / CHOICES), adapter, settings["r"], settings["lora_alpha"])
        except (OSError, SafetensorError, json.JSONDecodeError, KeyError) as error:
            raise UserError(f"cannot read the adapters in {folder}: {error}") from error

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Whether the folder holds a finished one."""
        return all((folder / name).is_file() for name in (CHOICES, ADAPTER_CONFIG, ADAPTER))

    @property
    def method(self) -> Recorded:
        """The method that prunes as recorded, given :attr:`choices`."""
        settings = self.choices.about["settings"]
        return Recorded(settings["blocks"], settings["attention_unit"])

    @property
    def amounts(self) -> dict[str, Any]:
        """The ratios and layers, as :func:`~pp_lightning.prune_` takes them."""
        return dict(self.choices.about["amounts"])

    @property
    def uniform(self) -> bool:
        """Whether every layer of the model keeps the same counts."""
        counts = {(block, len(choice.kept)) for (_, block), choice in self.choices.choices.items()}
        return not self.amounts["skip_layers"] and len(counts) == len({block for block, _ in counts})

    @property
    def label(self) -> str:
        """Short name for tables."""
        return f"{self.choices.about['method']}_lora"

    def attach(self, model: PreTrainedModel) -> Adapters:
        """The adapters on the pruned model, not merged yet."""
        adapters = Adapters(model, self.rank, self.alpha)
        try:
            adapters.load(self.adapter)
        except UserError:
            adapters.detach()
            raise
        return adapters
