"""A slice that stays between batches: only what the new choice brings in is copied.

The units of a packed slice are in the order of their slots, not ascending: which unit leaves decides where the next one
goes. Nothing that a block computes depends on the order.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pp_lightning.functional.selection import take_rows


@torch.library.custom_op(
    "pp_lightning::replace_units", mutates_args=("packed", "slots"), tags=(torch.Tag.cudagraph_unsafe,)
)
def replace_units_(
    packed: Sequence[Tensor], slots: Tensor, whole: Sequence[Tensor], widths: Sequence[int], kept: Tensor
) -> None:
    """Replace what is packed and no longer kept by what is kept and not yet packed, in place.

    How much that is depends on the data, so it is one operator to a compiler, which need not look inside. On a CPU that
    costs nothing; on an accelerator the host waits for the device, which no CUDA graph may record.

    Args:
        packed: (K * w, D) each, contiguous: the rows of the units in ``slots``.
        slots: (K,) int64, the unit in each slot.
        whole: (U * w, D) each, contiguous: the rows of all units.
        widths: w of each.
        kept: (K,) int64, the units to have.
    """
    number = whole[0].shape[0] // widths[0]
    wanted = torch.zeros(number, dtype=torch.bool, device=slots.device).index_fill_(0, kept, True)
    held = torch.zeros_like(wanted).index_fill_(0, slots, True)
    free = (~wanted[slots]).nonzero().squeeze(1)
    new = kept[~held[kept]]
    for rows, all_rows, width in zip(packed, whole, widths, strict=True):
        source = take_rows(all_rows, new, width).view(-1, width, all_rows.shape[1])
        rows.view(-1, width, rows.shape[1]).index_copy_(0, free, source)
    slots.index_copy_(0, free, new)


@torch.library.custom_op("pp_lightning::gather_units", mutates_args=())
def gather_units(whole: Tensor, kept: Tensor, width: int) -> Tensor:
    """:func:`take_rows` as one operator to a compiler: a CPU copies whole rows faster than generated loops do.

    Args:
        whole: (U * w, D), contiguous.
        kept: (K,) int64.
        width: w.

    Returns:
        (K * w, D).
    """
    return take_rows(whole, kept, width)


@gather_units.register_fake
def _(whole: Tensor, kept: Tensor, width: int) -> Tensor:
    return whole.new_empty(kept.shape[0] * width, whole.shape[1])


@torch.library.custom_op("pp_lightning::gather_units_into", mutates_args=("out",))
def gather_units_into_(out: Tensor, whole: Tensor, kept: Tensor, width: int) -> None:
    """:func:`gather_units` into memory that is there already: ``out`` (K * w, D), contiguous."""
    take_rows(whole, kept, width, out)


def sliced_rows(whole: Tensor, kept: Tensor, width: int, out: Tensor | None) -> Tensor:
    """Rows of the kept units by the fastest way there is: see :func:`take_rows`."""
    in_graph = torch.compiler.is_compiling() and not torch.is_grad_enabled()
    if not in_graph or whole.device.type != "cpu":
        return take_rows(whole, kept, width, out)
    if out is None:
        gathered: Tensor = gather_units(whole, kept, width)
        return gathered
    gather_units_into_(out, whole, kept, width)
    return out


class PackedSlice:
    """The packed rows of one block.

    Args:
        whole: by role, (U * w, D) contiguous: a projection's weight, the output matrix transposed.
        widths: by role, w.
        kept: (K,) int64, the units to start with.
    """

    def __init__(self, whole: Mapping[str, Tensor], widths: Mapping[str, int], kept: Tensor) -> None:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
        ):  # made here, but changed in place wherever the next batch runs
            self.slots = kept.clone()
            self.rows = {role: take_rows(weight, kept, widths[role]) for role, weight in whole.items()}

    def replace(self, whole: Mapping[str, Tensor], widths: Mapping[str, int], kept: Tensor) -> None:
        """Make it the slice of another choice (K,) of the same size."""
        roles = list(self.rows)
        replace_units_(
            [self.rows[role] for role in roles],
            self.slots,
            [whole[role] for role in roles],
            [widths[role] for role in roles],
            kept,
        )
