"""A choice that was made before and kept in a file: how a model that was fine-tuned after pruning comes back."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from pp_lightning.blocks import Block, BlockKey
from pp_lightning.calibration_data import CalibrationData, fingerprint
from pp_lightning.errors import UserError
from pp_lightning.methods.base import BlockName, BlockToPrune, StaticChoice, StaticMethod, UnitName


@dataclass
class Choices(CalibrationData):
    """The units that a static method kept.

    Attributes:
        model: fingerprint of the dense model.
        about: plain values to keep with them: method, settings, ratios.
    """

    called: ClassVar[str] = "choices"
    verb: ClassVar[str] = "prune"
    form: ClassVar[str] = "pp-lightning choices 1"

    model: str
    choices: dict[BlockKey, StaticChoice] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def check_model(self, model: PreTrainedModel) -> None:
        """Refuse another model than the one that was pruned."""
        if self.model != fingerprint(model):
            raise UserError(
                "these choices were collected on another model, or on this one in another dtype: load what was pruned"
            )

    def tensors(self) -> dict[str, Tensor]:
        """Kept indices, biases and changed columns by name, on the CPU."""
        tensors = {}
        for (layer, block), choice in self.choices.items():
            tensors[f"{layer}.{block.value}.kept"] = choice.kept.cpu()
            if choice.bias is not None:
                tensors[f"{layer}.{block.value}.bias"] = choice.bias.cpu()
            if choice.columns is not None:
                tensors[f"{layer}.{block.value}.columns"] = choice.columns.cpu().contiguous()
        return tensors

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file; an existing one is replaced only when the new one is complete."""
        self._write(path, {"model": self.model, "about": self.about}, self.tensors())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Choices":
        """Read a file written by :meth:`save`."""
        header, tensors = cls._read(path)
        choices = {}
        for name in [name for name in tensors if name.endswith(".kept")]:
            layer, block, _ = name.split(".")
            parts = (tensors.get(f"{layer}.{block}.{part}") for part in ("bias", "columns"))
            choices[int(layer), Block(block)] = StaticChoice(tensors[name], *parts)
        return cls(header["model"], choices, header["about"])


class Recorded(StaticMethod[Choices]):
    """Static: keeps what :class:`Choices` say.

    Args:
        blocks: which blocks the recorded method pruned.
        attention_unit: which units of attention.
    """

    label: ClassVar[str] = "recorded"
    calibration_data: ClassVar[type[CalibrationData]] = Choices

    def __init__(self, blocks: Sequence[BlockName], attention_unit: UnitName | None = None) -> None:
        super().__init__(blocks, attention_unit)

    @property
    def allocates(self) -> bool:
        """The counts are recorded."""
        return True

    def choose(
        self, blocks: Sequence[BlockToPrune], calibration_data: Choices
    ) -> Iterator[tuple[BlockToPrune, StaticChoice]]:
        """The recorded choices."""
        missing = [block.key for block in blocks if block.key not in calibration_data.choices]
        if missing:
            layer, kind = missing[0]
            raise UserError(f"these choices do not cover the {kind.value} block of layer {layer}: prune it again")
        for block in blocks:
            choice, device = calibration_data.choices[block.key], block.weight.device
            parts = (None if part is None else part.to(device) for part in (choice.bias, choice.columns))
            yield block, StaticChoice(choice.kept.to(device), *parts)

    def unit_scores(self, block: BlockToPrune, calibration_data: Choices) -> Tensor:
        """1 for kept units (U,) float32, 0 for the others."""
        kept = calibration_data.choices[block.key].kept.to(block.weight.device)
        return block.weight.new_zeros(block.units.number).float().index_fill(0, kept, 1.0)
