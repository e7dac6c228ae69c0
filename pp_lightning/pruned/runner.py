"""The stock code of one block with our code around its projections: nothing of it is replaced."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pp_lightning.blocks import AttentionUnit, Block, ModelShape, Units, units_of
from pp_lightning.families import BlockModules, unit_rows
from pp_lightning.interfaces import argument_names, replace_forward, restore_forward, run_stock
from pp_lightning.pruned.heads import HeadFields
from pp_lightning.pruned.inputs import Arguments
from pp_lightning.pruned.projection import PrunedProjection, Run
from pp_lightning.pruned.recomputing import evaluating
from pp_lightning.pruned.runs import Probing
from pp_lightning.pruned.slices import BlockSlices, SliceMemory


class BlockRunner:
    """Runs the stock code of one block on all units, on the kept ones, or up to its output projection.

    Args:
        modules: the block's modules.
        shape: the dense model's sizes.
        unit: what is pruned in attention.
        keep: K, how many units slices have.
        memory: for slices, shared by the blocks of the model.

    Attributes:
        modules: see above.
        units: of the block.
        projections: of the block by name, the output last.
        slices: of these.
        run: what they do at the moment; None outside of a pruned run.
        begin: told when a block without a module of its own meets a batch: what its first projection gives.
    """

    def __init__(
        self, modules: BlockModules, shape: ModelShape, unit: AttentionUnit, keep: int, memory: SliceMemory
    ) -> None:
        self.modules = modules
        self.units = units_of(shape, modules.block, unit)
        self.keep = keep
        self.run: Run | None = None
        self.begin: Callable[[PrunedProjection, Tensor], Tensor] | None = None
        self.module = modules.module
        self.names = argument_names(self.module)
        attention = modules.block is Block.ATTENTION
        # Single query heads of a group each get their own key and value; a fused projection has one for all of them.
        self._shared = attention and shape.grouped and unit is AttentionUnit.QUERY_HEAD
        self._repeats = shape.queries_per_key if self._shared and not modules.is_fused else 1
        self._head_size = shape.head_size
        self._memory = memory
        self.fields = _fields(modules, shape, self.units, self._repeats) if attention else None
        self._bind()

    @property
    def output(self) -> PrunedProjection:
        """The projection that leaves the block."""
        return self.projections[self.modules.output]

    @property
    def inputs(self) -> list[PrunedProjection]:
        """The projections into the block."""
        return [one for one in self.projections.values() if not one.is_output]

    # Standing around the stock code.

    def install(self, forward: Callable[..., Any] | None, begin: Callable[[PrunedProjection, Tensor], Tensor]) -> None:
        """Stand around the projections, and in front of the block.

        Args:
            forward: stands in for that of the block's module.
            begin: the same for a block without one: stands in for that of its first projection.
        """
        self.begin = begin
        if not self.modules.is_bare and forward is not None:
            replace_forward(self.module, forward)
        self._wrap()
        if self.fields is not None:
            self.fields.install()

    def remove(self) -> None:
        """Undo :meth:`install`."""
        self.rebind()
        self._unwrap()
        if not self.modules.is_bare:
            restore_forward(self.module)
        if self.fields is not None:
            self.fields.remove()

    def rebind(self) -> None:
        """Follow adapters, which put other modules in the place of projections."""
        if all(getattr(self.module, name) is one.module for name, one in self.projections.items()):
            return
        self._unwrap()
        self._bind()
        self._wrap()

    def _bind(self) -> None:
        self.projections = {name: self._projection(name) for name in self.modules.names}
        sliced = tuple(one for one in self.projections.values() if one.is_sliced)
        self.slices = BlockSlices(sliced, self.keep, self.units.number, self._memory)

    def _wrap(self) -> None:
        for one in self.projections.values():
            replace_forward(one.module, one.forward)
            if one.is_output and one.is_sliced:
                one.store_by_columns()

    def _unwrap(self) -> None:
        for one in self.projections.values():
            restore_forward(one.module)
            if one.is_output and one.is_sliced:
                one.store_by_rows()

    def _projection(self, name: str) -> PrunedProjection:
        module, is_output = self.modules.projection(name), name == self.modules.output
        parts = () if is_output else self.modules.inputs[name]
        repeats = self._repeats if any(part.role in ("key", "value") for part in parts) else 1
        return PrunedProjection(
            self,
            name,
            module,
            () if is_output else unit_rows(parts, self.units.number, shared=self._shared),
            self.units.number,
            is_output=is_output,
            is_linear=self.modules.is_linear(module),
            repeats=repeats,
            head_size=self._head_size,
            bare=self.modules.is_bare,
        )

    # Running it.

    def stock(self, hidden: Tensor, given: Arguments) -> Any:
        """What the block's module computes."""
        return run_stock(self.module, **{self.names[0]: hidden}, **given)

    def run_as(self, run: Run, hidden: Tensor, given: Arguments) -> Any:
        """The stock code with projections that do what ``run`` says."""
        if self.modules.is_bare:
            (first,) = self.inputs
            return run.leave(self.output, self.modules.activation(run.enter(first, hidden)))
        self.run = run
        if self.fields is not None:
            self.fields.narrow(run.kept)
        try:
            return self.stock(hidden, given)
        finally:
            self.run = None
            if self.fields is not None:
                self.fields.widen()

    def states(self, part: Tensor, given: Arguments, ahead: dict[str, Tensor] | None = None) -> Tensor:
        """What reaches the output projection, (b, s, C), on a part (b, s, D) of a batch with all weights.

        Args:
            part: what enters the block.
            given: the other arguments of its module.
            ahead: outputs of the other projections by name, where they are there already.
        """
        run = Probing(ahead)
        with evaluating(self.module):
            self.run_as(run, part, given)
        assert run.seen is not None
        return run.seen

    def whole_outputs(self, hidden: Tensor) -> dict[str, Tensor]:
        """The outputs of all units of every projection into the block, by name."""
        return {one.name: one.whole(hidden) for one in self.inputs}


def _fields(modules: BlockModules, shape: ModelShape, units: Units, repeats: int) -> HeadFields:
    family, queries = modules.family, units.channels // shape.head_size
    stays_one = repeats == 1 and shape.num_key_value_heads == 1
    return HeadFields(
        modules.module,
        family.query_counts,
        () if stays_one else family.key_counts,
        family.head_parameters,
        queries=queries,
        keys=queries if repeats > 1 else max(1, shape.num_key_value_heads // units.number),
        number=units.number,
        repeats=repeats,
    )
