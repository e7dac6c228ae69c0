"""A block's weights under a dynamic method: whole, sliced for a batch, held for decoding."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pp_lightning.blocks import BlockModules
from pp_lightning.functional.linear import wants_rows
from pp_lightning.functional.selection import store_by_columns
from pp_lightning.pruned.choice import Choice, HowToRun
from pp_lightning.pruned.packing import PackedSlice, sliced_rows
from pp_lightning.pruned.weights import Projection, Weights
from pp_lightning.pruned.workspace import Memory, SliceWorkspace


class BlockSlices:
    """Slices the projections of one block, and knows where the slices are.

    Args:
        modules: the block's modules.
        widths: rows (of ``output``: columns) that a unit has in each projection. What is not named stays whole.
        keep: K, how many units a slice has.
        units: how many there are. Nothing is sliced where all of them stay.
        workspace: memory for slices, shared by the blocks of the model.
        packs: keep the slice between batches, and copy only what the next choice changes. It costs the slice's memory.

    Attributes:
        packed: the slice that stays between batches; None without ``packs``.
        held: what tokens that continue the last batch run on; None where that was not asked for.
        size: elements of a slice.
    """

    def __init__(
        self,
        modules: BlockModules,
        widths: Mapping[str, int],
        keep: int,
        units: int,
        workspace: SliceWorkspace,
        *,
        packs: bool,
    ) -> None:
        self.packs = packs
        self.packed: PackedSlice | None = None
        self.held: Weights | None = None
        self._modules = modules
        self._widths = widths
        self._keep = keep
        self._slices = keep < units
        self._shared = workspace
        self._own: SliceWorkspace | None = None  # of what is held
        self._biases: dict[str, Tensor] = {}  # of what is held
        everything = sum(linear.weight.numel() for linear in (*modules.inputs.values(), modules.output))
        self.size = everything * keep // units
        if self._slices:
            workspace.reserve(self.size)

    def whole(self) -> Weights:
        """The block's projections, whole."""
        modules = {**self._modules.inputs, "output": self._modules.output}
        return Weights({role: Projection(module.weight, module.bias) for role, module in modules.items()})

    def of(self, choice: Choice, memory: Memory, roles: Sequence[str] | None = None) -> Weights:
        """The projections, those of ``roles`` (all that a unit has rows in) reduced to the kept units.

        Args:
            choice: the kept units, and what the output's bias is to restore.
            memory: where slices are written.
            roles: which projections are sliced.
        """
        whole, rows = self.whole(), {}
        for role in self._roles(roles):
            source, width = whole.rows(role), self._widths[role]
            place = memory((len(choice.kept) * width, source.shape[1]), source)
            rows[role] = sliced_rows(source, choice.kept, width, place)
        return whole.reduced(rows, choice.kept, self._widths).restoring(choice.restored)

    def for_batch(self, choice: Choice, roles: Sequence[str] | None = None, *, leave: bool = False) -> Weights:
        """:meth:`of` for a new batch, which :meth:`prepare` has been called for.

        Args:
            choice: the kept units, in whatever order the slices then have them, and what is restored.
            roles: which projections are sliced.
            leave: write them where :meth:`hold_left` finds them.
        """
        if self.packed is not None:
            self.packed.replace(self._rows(self._roles(roles)), self._widths, choice.kept)
            return self._packed_weights(self.packed, choice)
        workspace = self._memory_to_hold() if leave else self._shared
        return self.of(choice, workspace.begin(self._modules.output_weight), roles)

    def prepare(self, how: HowToRun, kept: Tensor) -> None:
        """Before a new batch: let go of slices held for decoding, and have memory for the next one.

        Args:
            how: the batch is run.
            kept: (K,) int64, the units that a new packed slice starts with.
        """
        self.held = None  # before slicing again, so that two never exist at once
        if not self._slices:
            return
        if not self.packs or torch.is_grad_enabled():
            self.packed = None
            workspace = self._memory_to_hold() if how.leaves else self._shared
            workspace.prepare(self._modules.output_weight)
            return
        roles = self._roles(["output"] if how.shares else None)
        if self.packed is None or list(self.packed.rows) != roles:
            self.packed = None  # before the next one is made
            self.packed = PackedSlice(self._rows(roles), self._widths, kept)

    def hold(self, last: Choice) -> Weights:
        """Weights for tokens that continue the last batch, sliced at the first of them.

        Args:
            last: the choice that the batch was run on.
        """
        if self.held is None:
            self.held = self._settled(self._to_hold(last)) if self._slices else self.whole()
        return self.held

    def hold_left(self, last: Choice) -> None:
        """Hold the slices that the last batch has left, as they are.

        Args:
            last: the choice that it was run on.
        """
        self.held = self._settled(self._left(last))

    @property
    def can_be_left(self) -> bool:
        """Whether decoding would run on a batch's slices as they are."""
        return not torch.is_grad_enabled() and not wants_rows(self._modules.output_weight)

    def forget(self) -> None:
        """Let go of all slices: the weights have changed."""
        self.held = self.packed = self._own = None
        self._biases = {}

    def lay_out_for_slicing(self) -> None:
        """Store the output matrix so that the kept columns are copied whole. No value changes, only the strides."""
        if self._slices:
            weight = self._modules.output.weight
            weight.data = store_by_columns(weight.data)

    def lay_out_as_stock(self) -> None:
        """Undo :meth:`lay_out_for_slicing`."""
        weight = self._modules.output.weight
        weight.data = weight.data.contiguous()

    def _to_hold(self, last: Choice) -> Weights:
        if self._packs_all:
            return self._left(last).by_rows()
        workspace, like = self._memory_to_hold(), self._modules.output_weight
        workspace.prepare(like)
        # in the order in which a cache has the heads
        kept = last.kept if self.packed is None else self.packed.slots
        return self.of(Choice(kept, last.restored), workspace.begin(like)).by_rows()

    def _left(self, last: Choice) -> Weights:
        if self._packs_all:
            assert self.packed is not None
            return self._packed_weights(self.packed, last)
        whole, rows = self.whole(), {}
        memory = self._memory_to_hold().begin(self._modules.output_weight)
        for role, width in self._widths.items():
            source = whole.rows(role)
            written = memory((self._keep * width, source.shape[1]), source)
            assert written is not None  # prepared before the batch
            rows[role] = written
        return whole.reduced(rows, last.kept, self._widths).restoring(last.restored)

    def _settled(self, weights: Weights) -> Weights:
        """The same, its biases where earlier prompts had theirs: CUDA graphs of decoding read everything in place."""
        if torch.is_grad_enabled():
            return weights
        whole, projections = self.whole().projections, dict(weights.projections)
        for role, (weight, bias) in weights.projections.items():
            if bias is not None and bias is not whole[role].bias:
                with torch.inference_mode(False):  # made here, but written wherever the next prompt runs
                    place = self._biases.setdefault(role, torch.empty_like(bias))
                projections[role] = Projection(weight, place.copy_(bias))
        return Weights(projections, weights.kept)

    def _memory_to_hold(self) -> SliceWorkspace:
        if self._own is None:
            self._own = SliceWorkspace(outlives_batch=True)
            self._own.reserve(self.size)
        return self._own

    def _packed_weights(self, packed: PackedSlice, choice: Choice) -> Weights:
        return self.whole().reduced(packed.rows, packed.slots, self._widths).restoring(choice.restored)

    def _rows(self, roles: Sequence[str]) -> dict[str, Tensor]:
        """Of each projection that is sliced, the units' rows, contiguous."""
        whole = self.whole()
        return {role: whole.rows(role) for role in roles}

    def _roles(self, roles: Sequence[str] | None) -> list[str]:
        return list(self._widths if roles is None else roles)

    @property
    def _packs_all(self) -> bool:
        return self.packed is not None and list(self.packed.rows) == list(self._widths)
