"""What methods choose from: something measured on a dense model, kept as a file of safetensors."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, ClassVar

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from pp_lightning.errors import UserError
from pp_lightning.stored import sample_of, write_whole

_SAMPLES_PER_WEIGHT = 64


class CalibrationData:
    """Something measured on a dense model. It fits that model only.

    Attributes:
        called: its name in files and messages, in the plural.
        verb: what a user does to have it: "calibrate", ...
        form: name and version of its file.
        model: fingerprint of the model that it was measured on, see :func:`fingerprint`.
    """

    called: ClassVar[str]
    verb: ClassVar[str]
    form: ClassVar[str]
    model: str

    def check_model(self, model: PreTrainedModel) -> None:
        """Refuse what was measured on another model."""
        if self.model != fingerprint(model):
            raise UserError(
                f"these {self.called} were collected on another model, or on this one in another dtype: {self.verb} it"
            )

    def _write(self, path: str | os.PathLike[str], header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Write the file; an existing one is replaced only when the new one is complete."""
        write_whole(Path(path), tensors, {"format": self.form, self.called: json.dumps(header)}, self.called)

    @classmethod
    def _read(cls, path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Header and tensors of a file.

        Raises:
            UserError: there is no such file, or it holds something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != cls.form:
                    raise UserError(f"{path} holds no {cls.called} of this version: {cls.verb} again")
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {cls.called} from {path}: {error}") from error
        return json.loads(metadata[cls.called]), tensors


def fingerprint(model: nn.Module) -> str:
    """A digest that tells models apart: SHA-256 over every weight's name, shape, dtype and a sample of its values."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        step = max(1, weight.numel() // _SAMPLES_PER_WEIGHT)
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        digest.update(sample_of(weight, step, _SAMPLES_PER_WEIGHT).float().cpu().numpy().tobytes())
    return digest.hexdigest()
