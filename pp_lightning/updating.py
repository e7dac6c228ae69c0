"""Weights that make up for what went: block by block, on calibration text as it arrives through the blocks before."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from pp_lightning.blocks import BlockKey
from pp_lightning.calibration_data import fingerprint
from pp_lightning.errors import UserError
from pp_lightning.families import BlockModules, layers_of
from pp_lightning.functional.least_squares import SecondMoments, solve_kept, squared_error
from pp_lightning.functional.selection import unit_channels
from pp_lightning.interfaces import INPUTS
from pp_lightning.layerwise import LayerByLayer
from pp_lightning.methods.base import BlockToPrune, StaticChoice
from pp_lightning.progress import Steps, Tell, ignore_line
from pp_lightning.sensitivity import some_rows
from pp_lightning.stored import write_whole

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
RIDGE_UNTRIED = 1e-2  # where nothing is held out
_HELD_OUT = 8192  # tokens at most: their states are kept in memory beside the moments


@dataclass(frozen=True)
class LeastSquares:
    """How a static choice's weights are updated: kept columns of every output matrix take over what removed ones did.

    Args:
        batches: calibration batches, as :func:`~pp_lightning.calibrate` takes them. The last tenth decides the ridge.
        ridge: fraction of the mean variance of a block's channels that is added to each; None takes, for each block,
            the one of :data:`RIDGES` that is best on the batches held out.
        bias: fit deviations from the mean, and put what is left of the mean into a bias; without it stock classes hold
            the result. None does so where the method restores means.
        folder: keep hidden states and finished blocks in this folder: memory then holds one block's moments, and an
            interrupted run goes on where it stopped. None keeps hidden states on the model's device.
        passes: evaluations of the batches held out that ``allocation="searched"`` may take.
        loss_tokens: tokens of the batches held out on which the loss is read with each block pruned alone, which scales
            a ranking over all blocks: L (L + 2) runs of a layer and 2 L + 1 of the head on them, for L layers, and
            2 L + 1 times their hidden states. 0 ranks without that, and so do models that predict no next token.
        tell: told of each layer, one line at a time.
    """

    batches: Sequence[Mapping[str, Any]]
    ridge: float | None = None
    bias: bool | None = None
    folder: str | Path | None = None
    passes: int = 200
    loss_tokens: int = 4096
    tell: Tell = ignore_line

    def __post_init__(self) -> None:
        if not self.batches:
            raise UserError("the update needs calibration batches")

    @property
    def held_out(self) -> Sequence[Mapping[str, Any]]:
        """The last tenth of the batches, at least one where there are two."""
        number = len(self.batches) // 10 or (1 if len(self.batches) > 1 else 0)
        return self.batches[len(self.batches) - number :]

    @property
    def loss_rows(self) -> list[dict[str, Any]]:
        """Rows of the batches held out on which the loss is read with each block pruned alone; none where it is not."""
        return some_rows(self.held_out, self.loss_tokens) if self.held_out and self.loss_tokens else []


@dataclass(frozen=True)
class UpdatedBlock:
    """What the update of one block came to.

    Attributes:
        error_before: squared error of the block's output on the tokens held out, without the update, as a fraction of
            the output's square.
        error: the same with it.
    """

    ridge: float
    error_before: float | None = None
    error: float | None = None


_Solved = tuple[UpdatedBlock, Tensor, Tensor | None]  # columns (D, K) and bias (D,), float64


class Updating:
    """Updates one block after the other while a static method prunes."""

    def __init__(self, model: PreTrainedModel, update: LeastSquares, restores_means: bool) -> None:
        if update.ridge is not None and not update.ridge >= 0.0:
            raise UserError(f"ridge must not be negative, not {update.ridge}")
        self.update = replace(update, bias=restores_means if update.bias is None else update.bias)
        self.updated: dict[BlockKey, UpdatedBlock] = {}
        folder = None if update.folder is None else Path(update.folder)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._held_out = len(update.held_out)
        self._time = Steps("updating", "layer", len(layers_of(model)))
        self._digest = digest_of(model, self.update)
        self._carried = LayerByLayer(model, update.batches, folder, self._digest)
        self._is_resumed = self._carried.layer > 0
        self._time.skip(self._carried.layer)

    def __call__(self, target: BlockToPrune, modules: BlockModules, choice: StaticChoice) -> StaticChoice:
        """The choice with new columns and bias for the block's output matrix."""
        self._carry_to(target.layer)
        if len(choice.kept) == target.units.number:
            return choice
        self._digest = hashlib.sha256(f"{self._digest}{target.key}{choice.kept.tolist()}".encode()).hexdigest()
        found = self._finished(target)
        if found is None:
            if self._carried.layer > target.layer:  # what an earlier run had found is gone
                self._is_resumed = False
                self._carried.restart()
                self._carry_to(target.layer)
            found = self._solved(target, modules, choice)
            self._keep(target, *found)
        block, columns, bias = found
        self.updated[target.key] = block
        device = target.weight.device
        return StaticChoice(choice.kept, None if bias is None else bias.to(device), columns.to(device))

    def _carry_to(self, layer: int) -> None:
        """Bring the batches in front of a layer, unless an earlier run brought them that far and further."""
        if self._is_resumed and self._carried.layer <= layer:
            self._is_resumed = False
            if self._carried.chain != self._digest:  # which made other choices
                self._carried.restart()
        while self._carried.layer < layer:
            self._carried.advance(self._digest)
            self.update.tell(self._time.line(self._carried.layer))

    def _solved(self, target: BlockToPrune, modules: BlockModules, choice: StaticChoice) -> _Solved:
        weight, update = modules.output_weight.detach(), self.update
        kept = unit_channels(choice.kept.to(weight.device), target.units.channels)
        moments, held = self._moments(target, modules)
        matrix = moments.matrix(about_mean=bool(update.bias))
        if not torch.isfinite(matrix).all():
            raise UserError(f"states of {_named(target)} are not finite: check the checkpoint, or use another dtype")
        if moments.count < len(matrix):
            update.tell(f"{_named(target)}: {moments.count} calibration tokens for {len(matrix)} channels are few")
        ridges = RIDGES if update.ridge is None else (update.ridge,)
        if update.ridge is None and held is None:
            ridges = (RIDGE_UNTRIED,)
        try:
            candidates = solve_kept(weight, matrix, kept, ridges)
        except torch.linalg.LinAlgError as error:
            raise UserError(
                f"second moments of {_named(target)} are singular: raise the ridge, or give more calibration text"
            ) from error
        biases = [self._bias(weight, columns, kept, moments) for columns in candidates]
        if held is None:
            return UpdatedBlock(ridges[0]), candidates[0], biases[0]
        errors = [squared_error(weight, columns, kept, held, b) for columns, b in zip(candidates, biases, strict=True)]
        best = min(range(len(ridges)), key=errors.__getitem__)
        plain = weight[:, kept].double()
        before = squared_error(weight, plain, kept, held, self._bias(weight, plain, kept, moments))
        whole = float((held.float() @ weight.float().t()).square().sum(dtype=torch.float64)) or 1.0
        return UpdatedBlock(ridges[best], before / whole, errors[best] / whole), candidates[best], biases[best]

    def _bias(self, weight: Tensor, columns: Tensor, kept: Tensor, moments: SecondMoments) -> Tensor | None:
        """What new columns lose of the mean, ``(W - W') E[x]``, (D,) float64; None where the update has no bias."""
        mean = moments.mean
        return (weight.double() @ mean - columns @ mean[kept]) if self.update.bias else None

    def _moments(self, target: BlockToPrune, modules: BlockModules) -> tuple[SecondMoments, Tensor | None]:
        """Of the batches that are fitted to, and the states (N, C) of those held out."""
        moments = SecondMoments(target.weight.shape[1], target.weight.device)
        held: list[Tensor] = []
        for number, states in enumerate(self._carried.states(modules)):
            if number >= len(self._carried) - self._held_out:
                if sum(map(len, held)) < _HELD_OUT:
                    held.append(states)
            else:
                moments.add(states)
        return moments, torch.cat(held)[:_HELD_OUT] if held else None

    def _file(self, target: BlockToPrune) -> Path | None:
        layer, block = target.key
        return None if self._folder is None else self._folder / f"block-{layer}-{block.value}.safetensors"

    def _finished(self, target: BlockToPrune) -> _Solved | None:
        """What an earlier run left of this block, if it had the same model, text and choices so far."""
        file = self._file(target)
        if file is None or not file.exists():
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
                if metadata.get("digest") != self._digest:
                    return None
                block = UpdatedBlock(**json.loads(metadata["block"]))
                bias = opened.get_tensor("bias") if self.update.bias else None
                return block, opened.get_tensor("columns"), bias
        except (OSError, SafetensorError):
            return None  # cut off while it was written

    def _keep(self, target: BlockToPrune, block: UpdatedBlock, columns: Tensor, bias: Tensor | None) -> None:
        file = self._file(target)
        if file is None:
            return
        metadata = {"digest": self._digest, "block": json.dumps(vars(block))}
        write_whole(file, {"columns": columns} | ({} if bias is None else {"bias": bias}), metadata)


def digest_of(model: PreTrainedModel, update: LeastSquares) -> str:
    """What tells one update from another: model, text and settings."""
    digest = hashlib.sha256(f"{fingerprint(model)} {update.ridge} {update.bias}".encode())
    for batch in update.batches:
        for name in INPUTS:
            if name in batch:
                digest.update(batch[name].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _named(target: BlockToPrune) -> str:
    return f"the {target.key[1].value} block of layer {target.layer}"
