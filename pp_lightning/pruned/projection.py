"""What stands around one projection of a pruned block. The projection itself is called or sliced, never replaced."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pp_lightning.functional.compensation import restored_mean
from pp_lightning.functional.linear import linear
from pp_lightning.functional.selection import Rows, store_by_columns, unit_channels
from pp_lightning.interfaces import displaced_forward, run_stock
from pp_lightning.pruned.choice import Choice
from pp_lightning.pruned.recomputing import evaluating

Product = Callable[[Tensor], Tensor]  # (..., in) to (..., out)


class PrunedProjection:
    """One projection of a block. Its :meth:`forward` stands in for the module's.

    Args:
        name: inside the block.
        module: a Linear, or anything else that maps the last dimension linearly: an adapter around a Linear, a
            quantised one.
        rows: which of its outputs belong to units; of the output projection, of its inputs.
        is_output: whether it leaves the block.
        is_linear: whether the module computes ``x W^T + b`` and nothing else.
        repeats: how often each head of its output is repeated: keys and values, where single query heads of a group are
            pruned and each brings its own.
        head_size: d, of the heads that are repeated.

    Attributes:
        displaced: what somebody had put in the place of the module's ``forward``; None if nobody.
        does: what the block has it do at the moment; None is what its module computes.
        idle: what it does outside of a pruned run; None is what its module computes.
        is_plain: whether the outputs of all units are one product.
        is_sliced: whether weights are sliced for it; other projections run whole and their output is sliced.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        rows: tuple[Rows, ...],
        *,
        is_output: bool,
        is_linear: bool,
        repeats: int = 1,
        head_size: int = 0,
    ) -> None:
        self.name = name
        self.module: Any = module
        self.displaced = displaced_forward(module)
        self.rows = rows
        self.is_output = is_output
        self.is_linear = is_linear
        self.repeats = repeats
        self.head_size = head_size
        self.does: Product | None = None
        self.idle: Product | None = None
        self.is_plain = is_linear and repeats == 1
        self.is_sliced = is_linear and repeats == 1 and any(part.width for part in rows)

    def forward(self, states: Tensor) -> Tensor:
        """Stands in for the module's ``forward``. Hooks of the module see a probe's states too, before the batch's."""
        does = self.idle if self.does is None else self.does  # dynamo of torch 2.11 knows no truth of a partial
        return self.stock(states) if does is None else does(states)

    def stock(self, states: Tensor) -> Tensor:
        """What the module computes."""
        module = self.module
        output: Tensor = run_stock(module, states) if self.displaced is None else self.displaced(states)
        return output

    def whole(self) -> Product:
        """Gives the outputs of all units."""
        if not self.is_linear:
            product: Product = self.stock
        else:
            product = partial(linear, weight=self.module.weight, bias=self.module.bias)
        return product if self.repeats == 1 else partial(self._repeated, product)

    def of_units(self, whole: Tensor, kept: Tensor) -> Tensor:
        """Outputs of all units (..., out), as :meth:`whole` gives them, reduced to those of the kept ones."""
        if self.repeats > 1:
            return whole.unflatten(-1, (-1, self.head_size)).index_select(-2, kept).flatten(-2)
        found = []
        for start, number, width in self.rows:
            own = whole if len(self.rows) == 1 else whole.narrow(-1, start, number)
            found.append(own.unflatten(-1, (-1, width)).index_select(-2, kept).flatten(-2) if width else own)
        return found[0] if len(found) == 1 else torch.cat(found, -1)

    def restored(self, mean: Tensor, kept_channels: Tensor, dtype: torch.dtype) -> Tensor:
        """What the channels that do not stay contribute to the output on average: see :func:`restored_mean`."""
        if self.is_linear:
            return restored_mean(self.module.weight, mean, kept_channels)
        removed = mean.index_fill(0, kept_channels, 0.0).to(dtype)
        with evaluating(self.module):
            found, nothing = self.stock(torch.stack([removed, torch.zeros_like(removed)]))
        return (found - nothing).float()

    def store_by_columns(self) -> None:
        """Store the output matrix so that the kept columns are copied whole. No value changes, only the strides."""
        self._store(store_by_columns)

    def store_by_rows(self) -> None:
        """Undo :meth:`store_by_columns`."""
        self._store(Tensor.contiguous)

    def _store(self, laid_out: Callable[[Tensor], Tensor]) -> None:
        weight = self.module.weight
        with torch.inference_mode(weight.is_inference()):  # a weight takes data of its own mode alone
            weight.data = laid_out(weight.data)

    def _repeated(self, product: Product, states: Tensor) -> Tensor:
        heads = product(states).unflatten(-1, (-1, self.head_size))
        return heads.repeat_interleave(self.repeats, -2).flatten(-2)

    def narrowed(self, choice: Choice, states: Tensor) -> Tensor:
        """The outputs of the kept units, of a projection that is not sliced."""
        if self.repeats == 1:
            return self.of_units(self.stock(states), choice.kept)
        heads = self.stock(states).unflatten(-1, (-1, self.head_size))
        return heads.index_select(-2, choice.kept // self.repeats).flatten(-2)

    def spread(self, choice: Choice, states: Tensor) -> Tensor:
        """What an output projection that is not sliced makes of the states of the kept units: the others are zero."""
        ((_, channels, width),) = self.rows
        whole = states.new_zeros(*states.shape[:-1], channels)
        output = self.stock(whole.index_copy(-1, unit_channels(choice.kept, width), states))
        return output if choice.restored is None else output + choice.restored.to(output.dtype)
