"""The stock code of one block with our code around its projections: nothing of it is replaced."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pp_lightning.blocks import AttentionUnit, Block, ModelShape, units_of
from pp_lightning.families import BlockModules, unit_rows
from pp_lightning.functional.linear import linear
from pp_lightning.functional.probe import Arguments
from pp_lightning.functional.selection import Rows, unit_channels
from pp_lightning.interfaces import argument_names, displaced_forward, replace_forward, restore_forward, unfused_on_cpus
from pp_lightning.parallel import Reduced, is_sharded
from pp_lightning.pruned.choice import Choice
from pp_lightning.pruned.heads import HeadFields
from pp_lightning.pruned.locks import Lock
from pp_lightning.pruned.projection import Product, PrunedProjection
from pp_lightning.pruned.recomputing import evaluating
from pp_lightning.pruned.slices import BlockSlices, Slice


class BlockRunner:
    """Runs the stock code of one block on all units, on the kept ones, or up to its output projection.

    Attributes:
        units: of the block.
        keep: K, how many units slices have.
        module: that owns the projections.
        names: of its arguments.
        projections: of the block, the output last.
        fields: what else fixes the number of heads; None where nothing does.
        lock: of the block's modules, which run in one way at a time.
    """

    def __init__(self, modules: BlockModules, shape: ModelShape, unit: AttentionUnit, keep: int) -> None:
        self.modules = modules
        self.units = units_of(shape, modules.block, unit)
        self.keep = keep
        self.module = modules.module
        self.names = argument_names(self.module)
        self._bare = modules.activation if modules.is_bare else None
        self._displaced = None if modules.is_bare else displaced_forward(self.module)
        self._head_size = shape.head_size
        # Single query heads of a group each get their own key and value; a fused projection has one for all of them.
        attention = modules.block is Block.ATTENTION
        self._shared = attention and shape.grouped and unit is AttentionUnit.QUERY_HEAD
        self._repeats = shape.queries_per_key if self._shared and not modules.is_fused else 1
        self.fields = self._fields_of(shape) if attention else None
        self.lock = Lock()
        self._bind()

    # Standing around the stock code.

    def install(self, forward: Callable[..., Any] | None, begin: Product | None, end: Product | None) -> None:
        """Stand around the projections, and in front of the block.

        ``forward`` stands in for that of the block's module; None leaves it. ``begin`` does the same for a block
        without one, ``end`` for its output projection.
        """
        if self._bare is not None:
            self.inputs[0].idle, self.output.idle = begin, end
        elif forward is not None:
            replace_forward(self.module, forward)
        self._wrap()
        if self.fields is not None:
            self.fields.install()

    def remove(self) -> None:
        """Undo :meth:`install`."""
        self.rebind()
        self._unwrap()
        if self._bare is None:
            restore_forward(self.module, self._displaced)
        if self.fields is not None:
            self.fields.remove()

    def rebind(self) -> bool:
        """Follow adapters, which put other modules in the place of projections. Whether there was any to follow."""
        if not self._has_moved():
            return False
        idle = self.inputs[0].idle, self.output.idle
        self._unwrap()
        self._bind()
        self.inputs[0].idle, self.output.idle = idle
        self._wrap()
        return True

    def _has_moved(self) -> bool:
        here = self.module._modules
        for one in self.projections:  # noqa: SIM110  asked for every block and token
            if here[one.name] is not one.module:
                return True
        return False

    def _bind(self) -> None:
        self.inputs: Sequence[PrunedProjection] = [self._input(name) for name in self.modules.inputs]
        name, columns = self.modules.output, Rows(0, self.units.number * self.units.channels, self.units.channels)
        module = self.modules.projection(name)
        self.output = PrunedProjection(
            name, module, (columns,), is_output=True, is_linear=self.modules.is_linear(module)
        )
        self.projections = (*self.inputs, self.output)
        sliced = [(one.name, one.module, one.rows) for one in self.projections if one.is_sliced]
        self.slices = BlockSlices(sliced, name, self.keep)

    def _wrap(self) -> None:
        for one in self.projections:
            replace_forward(one.module, one.forward)
        if self._lays_out:
            self.output.store_by_columns()

    def _unwrap(self) -> None:
        for one in self.projections:
            restore_forward(one.module, one.displaced)
        if self._lays_out:
            self.output.store_by_rows()

    @property
    def _lays_out(self) -> bool:
        """Whether the output matrix can be stored in another order: FSDP brings a new one for every batch."""
        return self.output.is_sliced and not is_sharded(self.modules.layer)

    def _input(self, name: str) -> PrunedProjection:
        module, parts = self.modules.projection(name), self.modules.inputs[name]
        return PrunedProjection(
            name,
            module,
            tuple(unit_rows(parts, self.units.number, shared=self._shared)),
            is_output=False,
            is_linear=self.modules.is_linear(module),
            repeats=self._repeats if any(part.role in ("key", "value") for part in parts) else 1,
            head_size=self._head_size,
        )

    def _fields_of(self, shape: ModelShape) -> HeadFields | None:
        family, queries = self.modules.family, self.units.channels // shape.head_size
        stays_one = self._repeats == 1 and shape.num_key_value_heads == 1
        counts = family.query_counts, () if stays_one else family.key_counts
        names = family.head_parameters if self._shared else family.head_parameters + family.key_parameters
        parameters = [name for name in names if self._has(name)]
        if not any((*counts, parameters, self._repeats > 1)):
            return None
        return HeadFields(
            self.module,
            *counts,
            parameters,
            queries=queries,
            keys=queries if self._repeats > 1 else max(1, shape.num_key_value_heads // self.units.number),
            number=self.units.number,
            repeats=self._repeats,
        )

    def _has(self, path: str) -> bool:
        return any(name == path for name, _ in self.module.named_parameters())

    # Running it.

    def stock(self, hidden: Tensor, given: Arguments) -> Any:
        """What the block's module computes."""
        if self._displaced is not None:
            return self._displaced(hidden, **given)
        return type(self.module).forward(self.module, **{self.names[0]: hidden}, **given)

    def states(self, part: Tensor, given: Arguments, ahead: dict[str, Tensor] | None = None) -> Tensor:
        """What reaches the output projection, (b, s, C), on a part (b, s, D) of a batch with all weights.

        ``part`` (b, s, D) enters the block; ``ahead`` are outputs of the other projections by name, where they are
        there already.
        """
        if self._bare is not None:
            states: Tensor = self._bare(self.inputs[0].whole()(part))
            return states
        seen: list[Tensor] = []
        does = self.widened(partial(_caught, seen), ahead)
        mask = given.get("attention_mask")
        if self.module.training or not (mask is None or isinstance(mask, Tensor)):
            with self.lock.taken(), evaluating(self.module), unfused_on_cpus(mask):
                self.run(part, given, does)
        else:
            self.run(part, given, does)
        return seen[0]

    def narrowed(self, choice: Choice, weights: Slice, ahead: dict[str, Tensor] | None = None) -> list[Product]:
        """What the projections do on the kept units.

        ``ahead`` are outputs of all units by projection, where they are there already.
        """
        does: list[Product] = []
        for one in self.inputs:
            if ahead is not None:
                does.append(partial(_there, one.of_units(ahead[one.name], choice.kept)))
            elif one.is_sliced:
                weight, bias = weights[one.name]
                does.append(partial(linear, weight=weight, bias=bias))
            else:
                does.append(partial(one.narrowed, choice))
        does.append(self.leaving(choice, weights))
        return does

    def leaving(self, choice: Choice, weights: Slice) -> Product:
        """What the output projection does on the kept units."""
        if not self.output.is_sliced:
            return partial(self.output.spread, choice)
        weight, bias = weights[self.output.name]
        product = partial(linear, weight=weight, bias=bias)
        reduced = self.output.displaced
        return partial(reduced.of, product) if isinstance(reduced, Reduced) else product

    def widened(self, then: Product, ahead: dict[str, Tensor] | None = None) -> list[Product]:
        """What the projections do on all units, up to the output projection.

        ``then`` is what the output projection does with the states that reach it.
        """
        does: list[Product] = []
        for one in self.inputs:
            if ahead is not None:
                does.append(partial(_there, ahead[one.name]))
            elif one.is_plain:
                does.append(partial(linear, weight=one.module.weight, bias=one.module.bias))
            else:
                does.append(one.whole())
        return [*does, then]

    def run(self, hidden: Tensor, given: Arguments, does: Sequence[Product] = (), kept: Tensor | None = None) -> Any:
        """The stock code. One thread at a time is inside of one block; others are in other blocks.

        ``hidden`` is (B, S, D) or (B * S, D). ``does`` is what the projections do, the output last; without, what their
        modules compute. It is done on the units ``kept`` (K,) int64; None is all.
        """
        if self._bare is not None:
            enter, leave = does
            return leave(self._bare(enter(hidden)))
        fields = self.fields if kept is not None else None
        with self.lock.taken():
            try:
                for one, product in zip(self.projections, does, strict=False):
                    one.does = product
                if fields is not None:
                    fields.narrow(kept)
                return self.stock(hidden, given)
            finally:
                for one in self.projections:
                    one.does = None
                if fields is not None:
                    fields.widen()

    def whole_outputs(self, hidden: Tensor) -> dict[str, Tensor]:
        """The outputs of all units of every projection into the block, by name."""
        return {one.name: one.whole()(hidden) for one in self.inputs}

    def silenced(self, kept: Tensor, states: Tensor) -> Tensor:
        """The output of states (..., C) of all units, those that are not kept silent: what slicing must equal."""
        channels = unit_channels(kept, self.units.channels)
        silent = torch.ones(states.shape[-1], dtype=torch.bool, device=states.device).index_fill(0, channels, False)
        return self.output.stock(states.masked_fill(silent, 0.0))


def _there(output: Tensor, states: Tensor) -> Tensor:
    """What a projection gives where its output is there already."""
    return output


def _caught(seen: list[Tensor], states: Tensor) -> Tensor:
    """What stands for the output on a probe: of interest is what reached it."""
    seen.append(states)
    return states
