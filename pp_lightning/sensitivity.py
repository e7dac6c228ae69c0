"""How much the loss rises when one block alone is pruned: what makes the losses of different blocks comparable.

What a block loses of its own output says little about what the model loses: some blocks hardly matter for the next
token, others decide it. Each block is pruned alone, its weights updated, and the loss is read on a few tokens.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from pp_lightning.blocks import BlockKey
from pp_lightning.errors import UserError
from pp_lightning.families import BlockModules, layers_of
from pp_lightning.interfaces import INPUTS
from pp_lightning.layerwise import LayerByLayer
from pp_lightning.progress import Steps, Tell
from pp_lightning.stored import described, places_of, resident, write_whole

_IGNORED = -100
_SMALLEST_RATIO = 1e-6  # where no block makes a difference, all count as they were predicted

Batches = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class PrunedAlone:
    """One block with the channels ``kept`` (K,) int64 alone; ``columns`` gives its output matrix's for them, (D, K)."""

    modules: BlockModules
    kept: Tensor
    columns: Callable[[], Tensor]

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Within this context the block gives what it would; its weights, which are in memory, stay as they are."""
        weight = self.modules.output_weight.detach()
        wide = weight if weight.dtype == torch.float64 else weight.float()
        kept, columns = self.kept.to(weight.device), self.columns().to(wide)
        change = torch.zeros_like(wide).index_copy_(1, kept, columns).sub_(wide).to(weight.dtype)

        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + linear(inputs[0], change.to(inputs[0]))

        hook = self.modules.projection(self.modules.output).register_forward_hook(add)
        try:
            yield
        finally:
            hook.remove()


@torch.no_grad()
def loss_rises(
    model: PreTrainedModel,
    batches: Batches,
    blocks: Mapping[BlockKey, PrunedAlone],
    folder: Path | None,
    about: str,
    tell: Tell,
) -> dict[BlockKey, float]:
    """Rise of the mean next-token loss when each block alone is pruned, in nats a token; negative where it falls.

    All go through the model side by side, each from its own layer on: for L layers of two blocks L (L + 2) runs of a
    layer, 2 L + 1 of the head, and so many copies of the batches' hidden states.

    ``folder`` keeps hidden states and what was found, where an interrupted run goes on; None is memory.
    """
    file = None if folder is None else folder / "rises.safetensors"
    if file is not None and described(file) == about:
        return dict(zip(blocks, places_of(file)["rises"].read().tolist(), strict=True))
    carried = LayerByLayer(model, batches, folder, about)
    _carry_all(carried, layers_of(model), blocks, tell)
    steps, losses = Steps("reading losses", "block", len(blocks)), []
    for copy in range(len(blocks) + 1):

        def loss_of(number: int, labels: Tensor, first: int = copy * len(batches)) -> Tensor:
            loss: Tensor = carried.output(model, first + number, labels=labels.to(model.device)).loss
            return loss

        losses.append(mean_loss(batches, loss_of))
        tell(steps.line(copy))
    rises = torch.tensor(losses[1:], dtype=torch.float64) - losses[0]
    if not torch.isfinite(rises).all():
        raise UserError("losses of blocks that are pruned alone are not finite: use float32 or bfloat16")
    if file is not None:
        write_whole(file, {"rises": rises}, {"about": about}, "what blocks cost")
    return dict(zip(blocks, rises.tolist(), strict=True))


def _carry_all(
    carried: LayerByLayer, layers: Sequence[nn.Module], blocks: Mapping[BlockKey, PrunedAlone], tell: Tell
) -> None:
    """Bring the batches behind the last layer: copy 0 dense, copy 1 with the first block pruned, and so on."""
    starting = [[block for key, block in blocks.items() if key[0] == layer] for layer in range(len(layers))]
    runs, copies = [0], 1
    for found in starting:
        copies += len(found)
        runs.append(runs[-1] + copies)
    steps = Steps("pruning blocks alone", "run", runs[-1])
    steps.skip(runs[carried.layer])
    for layer in range(carried.layer, len(layers)):
        with resident(layers[layer]):
            for block in starting[layer]:
                with block.acting():
                    carried.fork()
            carried.advance()
        tell(steps.line(runs[layer + 1]))


def mean_loss(batches: Batches, loss_of: Callable[[int, Tensor], Tensor]) -> float:
    """Mean next-token loss over the real tokens of all batches, in nats.

    ``loss_of`` gives a batch's mean loss, by its number and labels (B, S).
    """
    total, predicted = 0.0, 0
    for number, batch in enumerate(batches):
        labels = batch["input_ids"]
        if batch.get("attention_mask") is not None:
            labels = labels.masked_fill(batch["attention_mask"] == 0, _IGNORED)
        tokens = int((labels[:, 1:] != _IGNORED).sum())
        total += float(loss_of(number, labels)) * tokens if tokens else 0.0
        predicted += tokens
    if not predicted:
        raise UserError("calibration texts of one token predict nothing: give longer ones")
    return total / predicted


def some_rows(batches: Batches, tokens: int) -> list[dict[str, Any]]:
    """The first rows of each batch, about so many tokens in all: at least a row of the first batch."""
    length = batches[0]["input_ids"].shape[1]
    number = min(len(batches), max(1, tokens // length))
    rows = max(1, tokens // (length * number))
    return [{name: batch[name][:rows] for name in INPUTS if name in batch} for batch in batches[:number]]


def scaled(
    losses: Mapping[BlockKey, Tensor], counts: Mapping[BlockKey, int], rises: Mapping[BlockKey, float]
) -> dict[BlockKey, Tensor]:
    """Blocks' losses (U,) float32 in nats: half by what was measured on the block, half by the median over all of them.

    A rise is read on few tokens, so that by itself it would trust its noise (docs/static.md). ``losses`` are as the
    ranking predicts them, ``counts`` the units that stayed where a block was pruned alone, ``rises`` those of the loss
    then; a negative one counts as none.
    """
    predicted = {key: float(losses[key][counts[key] :].sum()) for key in rises}
    ratios = {key: max(rise, 0.0) / predicted[key] for key, rise in rises.items() if predicted[key] > 0.0}
    middle = max(statistics.median(ratios.values()), _SMALLEST_RATIO) if ratios else 1.0
    return {key: one * ((ratios.get(key, middle) + middle) / 2) for key, one in losses.items()}
