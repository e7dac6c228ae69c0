"""Pruning while adapters train: moving averages of scores, masks, and a schedule (LoRAPrune)."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pp_lightning.blocks import BlockKey
from pp_lightning.errors import UserError
from pp_lightning.families import OUTPUT
from pp_lightning.functional.schedule import cubic_ratio, last_ratio, removed_units
from pp_lightning.functional.selection import keep_best
from pp_lightning.importances import Importances
from pp_lightning.methods.base import BlockToPrune, StaticChoice
from pp_lightning.methods.lora_prune import LORA, LoRAPrune
from pp_lightning.recovery.adapters import Adapters
from pp_lightning.recovery.importances import adapter_members


class GradualPruning:
    """Masks that close while adapters train. A masked unit adds nothing to its block's output, as if it were removed.

    Attributes:
        masks: by block, (U,) float32, 1 where a unit is there.
        averages: by block, the moving average of the scores (U,) float32.
    """

    def __init__(self, adapters: Adapters, blocks: Sequence[BlockToPrune], method: LoRAPrune, total_steps: int) -> None:
        check_schedule(method, total_steps)
        self.adapters = adapters
        self.blocks = list(blocks)
        self.method = method
        self.total_steps = total_steps
        self.masks = {b.key: torch.ones(b.units.number, dtype=torch.float32, device=b.weight.device) for b in blocks}
        self.averages = {key: torch.zeros_like(mask) for key, mask in self.masks.items()}
        layers = dict(adapters.layers())
        self._hooks = [
            layers[b.key, OUTPUT].register_forward_pre_hook(partial(self._hide, b.key, b.units.channels))
            for b in blocks
        ]

    @torch.no_grad()
    def after_gradients(self, step: int) -> None:
        """Take the gradients of step ``step`` (from 1) into the averages, and remove units when it is time."""
        found = adapter_members(self.adapters, sorted({block.layer for block in self.blocks}))
        calibration_data = Importances("", LORA, found)
        momentum = self.method.momentum
        for block in self.blocks:
            scores = self.method.unit_scores(block, calibration_data)
            self.averages[block.key].mul_(momentum).add_(scores, alpha=1 - momentum)
        if step % self.method.every == 0:
            self._remove(step)

    def ratio(self, step: int) -> float:
        """How far the schedule has come after ``step``, from 0 to 1."""
        return cubic_ratio(step, self.total_steps, 1.0, self.method.warmup, self.method.cooldown)

    def choices(self) -> dict[BlockKey, StaticChoice]:
        """The units that are left."""
        return {key: StaticChoice(mask.nonzero().flatten()) for key, mask in self.masks.items()}

    def detach(self) -> None:
        """Take the masks off the model."""
        for hook in self._hooks:
            hook.remove()

    def state(self) -> dict[str, Tensor]:
        """Masks and averages by name."""
        named = {"mask": self.masks, "average": self.averages}
        return {
            f"{layer}.{block.value}.{n}": t for n, by_block in named.items() for (layer, block), t in by_block.items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def _remove(self, step: int) -> None:
        for block in self.blocks:
            mask, number = self.masks[block.key], block.units.number
            ratio = self.ratio(step) * block.plan.ratio
            removed = removed_units(number, block.plan.keep, ratio, block.plan.ratio)
            if removed > int((mask == 0).sum()):
                scores = block.informative(self.averages[block.key]).masked_fill(mask == 0, -1.0)
                mask.zero_()[keep_best(scores, number - removed)] = 1.0

    def _hide(self, key: BlockKey, channels: int, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        states, *others = inputs
        return states * self.masks[key].repeat_interleave(channels).to(states.device, states.dtype), *others


def check_schedule(method: LoRAPrune, total_steps: int) -> None:
    """Refuse a schedule that ends before it reaches its ratio."""
    reached = last_ratio(total_steps, method.every, 1.0, method.warmup, method.cooldown)
    if reached < 1.0:
        raise UserError(
            f"the pruning schedule reaches {int(100 * reached)}% of its ratio in {total_steps} steps: "
            "train longer, or lower every or raise cooldown of the method"
        )
