"""Hidden states of many batches: in memory, or on disk, where an interrupted run finds them again."""

import json
from pathlib import Path

import torch
from torch import Tensor

from pp_lightning.errors import UserError


class HiddenStates:
    """What enters a layer, of each batch, and what comes out of it until all batches have gone through.

    ``about`` tells the batches, and the model, from others; empty finds nothing again.

    Attributes:
        layer: that they are in front of; 0 where no earlier run left any.
        count: how many are in front of it: one of each batch, or several.
        chain: what was last said of them.
    """

    def __init__(self, number: int, folder: Path | None, about: str = "") -> None:
        self._number = number
        self._folder = folder
        self._here: dict[int, Tensor] = {}
        self._next: dict[int, Tensor] = {}
        self._likes: dict[int, Tensor] = {}  # on disk: shape and dtype of each batch's
        self._side = 0  # two files a batch: a killed run leaves those of the layer that it was in
        self._about = about
        self.layer, self.count, self.chain = 0, 0, ""
        if folder is not None and about:
            self._find(folder)

    def __len__(self) -> int:
        """How many batches there are."""
        return self._number

    def get(self, number: int) -> Tensor:
        """What enters the layer, (B, S, D), by the number that it was put under."""
        if self._folder is None:
            return self._here[number]
        like = self._likes[number]
        try:
            found = torch.from_file(str(self._file(number, self._side)), size=like.numel(), dtype=like.dtype)
        except RuntimeError as error:
            raise UserError(f"cannot read hidden states from {self._folder}: remove it, and begin anew") from error
        return found.clone().view(like.shape)

    def put(self, number: int, states: Tensor) -> None:
        """Keep what comes out of the layer."""
        if self._folder is None:
            self._next[number] = states
            self._here.pop(number, None)
            return
        self._likes[number] = torch.empty_like(states, device="meta")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._file(number, 1 - self._side).open("wb") as file:
                file.write(states.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        except OSError as error:
            raise UserError(f"cannot write hidden states to {self._folder}: {error.strerror or error}") from error

    def turn(self, layer: int, chain: str) -> None:
        """Take what came out for what enters the next layer.

        ``chain`` tells these states from others of the same batches.
        """
        self._here, self._next = self._next, {}
        self.layer, self.chain = layer, chain
        self._side = 1 - self._side
        self.count = len(self._here if self._folder is None else self._likes)
        if self._folder is None:
            return
        likes = [[list(like.shape), str(like.dtype).removeprefix("torch.")] for _, like in sorted(self._likes.items())]
        content = {"about": self._about, "layer": layer, "chain": chain, "side": self._side, "likes": likes}
        try:
            unfinished = self._folder / "hidden.json.unfinished"
            unfinished.write_text(json.dumps(content), encoding="utf-8")
            unfinished.replace(self._folder / "hidden.json")
        except OSError as error:
            raise UserError(f"cannot write hidden states to {self._folder}: {error.strerror or error}") from error

    def _find(self, folder: Path) -> None:
        """What an earlier run left of the same batches."""
        try:
            content = json.loads((folder / "hidden.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if content["about"] != self._about or len(content["likes"]) % self._number:
            return
        self.layer, self.chain, self._side = content["layer"], content["chain"], content["side"]
        for number, (shape, dtype) in enumerate(content["likes"]):
            self._likes[number] = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        self.count = len(self._likes)

    def _file(self, number: int, side: int) -> Path:
        assert self._folder is not None
        return self._folder / f"hidden-{number}-{side}.bin"
