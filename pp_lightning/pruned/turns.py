"""One layer after the other has its weights in memory while it is sliced, where weights stay on disk."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

from transformers import PreTrainedModel

from pp_lightning.blocks import BlockKey
from pp_lightning.calibration_data import fingerprint
from pp_lightning.families import layers_of
from pp_lightning.interfaces import give_memory_back
from pp_lightning.methods.base import BlockToPrune, StaticChoice
from pp_lightning.progress import Steps, Tell, ignore_line
from pp_lightning.stored import is_settled, keep, resident


class Turns:
    """Gives layers their turn, and leaves each on disk after it. Does nothing for a model that is in memory.

    Attributes:
        leave: whether layers are left on disk.
        place: the folder that was made, which is there as long as this object.
    """

    def __init__(self, model: PreTrainedModel, folder: str | Path | None, tell: Tell = ignore_line) -> None:
        self._layers = layers_of(model)
        self._tell, self._steps = tell, Steps("pruning", "layer", len(self._layers))
        self.leave = is_settled(self._layers[0])
        self.place: TemporaryDirectory[str] | None = None
        self._now: int | None = None
        self._holding = ExitStack()
        if not self.leave:
            return
        if folder is None:
            self.place = TemporaryDirectory(prefix="pp-lightning-")
            folder = self.place.name
        self._folder = Path(folder)
        self._digest = hashlib.sha256(fingerprint(model).encode())

    def of(self, choices: Iterable[tuple[BlockToPrune, StaticChoice]]) -> Iterator[tuple[BlockToPrune, StaticChoice]]:
        """The choices, each while its layer has its turn."""
        for target, choice in choices:
            if self.leave and target.layer != self._now:
                self._end()
                self._now = target.layer
                self._holding.enter_context(resident(self._layers[target.layer]))
            yield target, choice

    def note(self, key: BlockKey, choice: StaticChoice) -> None:
        """Remember what is done to a block: a layer that was left before is only the same if all of it is."""
        if not self.leave:
            return
        self._digest.update(f"{key}{choice.kept.tolist()}".encode())
        for part in (choice.bias, choice.columns):
            if part is not None:
                self._digest.update(part.detach().cpu().contiguous().numpy().tobytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._end()
        else:
            self._holding.close()

    def _end(self) -> None:
        self._holding.close()
        if self._now is not None:
            file = self._folder / f"layer-{self._now}.safetensors"
            keep(self._layers[self._now], file, self._digest.hexdigest())
            give_memory_back()
            self._tell(self._steps.line(self._now + 1))
