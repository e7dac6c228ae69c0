"""Gradient importances: what one or more backward passes say about each row and column of the projections."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from pp_lightning.blocks import Block, BlockKey
from pp_lightning.calibration_data import CalibrationData
from pp_lightning.errors import UserError

Members = Mapping[str, Tensor]


def by_role(roles: str, vector: Tensor) -> dict[str, Tensor]:
    """A projection's vector by role. A projection of several roles has as many rows of each, as gate and up have."""
    names = roles.split("+")
    return dict(zip(names, vector.chunk(len(names)), strict=True))


@dataclass
class Importances(CalibrationData):
    """Importance of the outputs of every projection into a block, and of the inputs of its output matrix.

    Attributes:
        model: fingerprint of the model that they were collected on.
        kind: how an element was scored: a :class:`~pp_lightning.functional.taylor.Taylor` variant, or ``lora``.
        members: by block, one vector a projection, by role: (out,) float32, and (in,) for ``output``.
    """

    called: ClassVar[str] = "importances"
    verb: ClassVar[str] = "collect"
    form: ClassVar[str] = "pp-lightning importances 1"

    model: str
    kind: str
    members: dict[BlockKey, Members] = field(default_factory=dict)

    def of(self, key: BlockKey, kind: str) -> list[Tensor]:
        """The vectors of one block."""
        if self.kind != kind:
            raise UserError(f"these importances are {self.kind}, but the method asks for {kind}: collect them again")
        if key not in self.members:
            layer, block = key
            raise UserError(f"these importances do not cover the {block.value} block of layer {layer}")
        return list(self.members[key].values())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file; an existing one is replaced only when the new one is complete."""
        tensors = {
            f"{layer}.{block.value}.{role}": vector.contiguous()
            for (layer, block), members in self.members.items()
            for role, vector in members.items()
        }
        self._write(path, {"model": self.model, "kind": self.kind}, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Importances":
        """Read a file written by :meth:`save`.

        Raises:
            UserError: there is no such file, or it is not one of ours.
        """
        header, tensors = cls._read(path)
        members: dict[BlockKey, dict[str, Tensor]] = {}
        for name, vector in tensors.items():
            layer, block, role = name.split(".")
            members.setdefault((int(layer), Block(block)), {})[role] = vector
        return cls(**header, members=dict(members))
