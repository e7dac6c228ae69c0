"""How many units stay in each block when one ranking over all of them decides, at a given saving of FLOPs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Removable:
    """One block, as the allocation sees it.

    Attributes:
        losses: (U,) float32, what losing each unit costs in quality, comparable between blocks.
        unit_flops: FLOPs that one unit takes.
        step: units that go at a time, so that kept counts are multiples of it.
        floor: units that stay whatever they are worth.
    """

    losses: Tensor
    unit_flops: int
    step: int
    floor: int


@dataclass(frozen=True)
class _Offer:
    """The next ``step`` units of a block: what they cost in quality for each FLOP, and the FLOPs they free."""

    loss_per_flop: float
    flops: int
    block: int
    units: int


def allocate(blocks: Sequence[Removable], flops_to_save: int) -> list[int]:
    """Units that stay in each block.

    Greedy: within a block the least valuable units go first, over all blocks the steps that lose least for each FLOP.
    A step that would save more than is left is passed over for the next one that does not, so at most
    ``flops_to_save`` are saved. Everything is a Python integer: counts are fixed before any graph is traced.
    """
    offers = sorted((offer for index, block in enumerate(blocks) for offer in _offers(index, block)), key=_price)
    keep = [len(block.losses) for block in blocks]
    left = flops_to_save
    closed: set[int] = set()  # a block's steps go in order: none after one that was passed over
    for offer in offers:
        if offer.block in closed:
            continue
        if offer.flops > left:
            closed.add(offer.block)
            continue
        left -= offer.flops
        keep[offer.block] -= offer.units
    return keep


def floor_count(num_units: int, floor: float, step: int) -> int:
    """``floor`` (a fraction) of the units, rounded up to a multiple of ``step``: at least one step, at most all."""
    return min(num_units, max(1, math.ceil(floor * num_units / step - 1e-9)) * step)


def _offers(index: int, block: Removable) -> list[_Offer]:
    ascending = block.losses.double().sort().values.cumsum(0).tolist()
    offers, gone, spent = [], 0, 0.0
    # The first step takes the remainder with it, if there is one: what stays is then a multiple of the step.
    units = len(block.losses) % block.step or block.step
    while len(block.losses) - gone - units >= block.floor:
        gone += units
        total = ascending[gone - 1]
        flops = units * block.unit_flops
        offers.append(_Offer((total - spent) / flops, flops, index, units))
        spent, units = total, block.step
    return offers


def _price(offer: _Offer) -> tuple[float, int]:
    return offer.loss_per_flop, offer.block


def relative_output_losses(
    weight: Tensor, lost: Tensor, residual: Tensor, counts: Tensor, channels_per_unit: int
) -> Tensor:
    """What losing each unit adds to the block's output, in squares relative to the residual: (U,) float32.

    ``sum_i W_ic^2`` times the mean over tokens of ``E[e_c^2] / E[||R||^2]`` at its position, where e_c is what is
    lost of channel c: x_c itself or, where its mean is put back, its deviation from the mean. Relative, because every
    following block sees the residual through a norm; by position, because the first tokens of a text can have residuals
    a thousand times larger than all others, which would otherwise be all that counts. Channels of a head are summed as
    if they were uncorrelated.

    Args:
        weight: output matrix (D, C) of any dtype.
        lost: E[e^2] by position, (P, C) float32.
        residual: E[||R||^2] by position, (P,) float32.
        counts: tokens seen at each position, (P,) float32.
        channels_per_unit: channels in a unit.
    """
    share = torch.where(residual > 0, counts / counts.sum() / residual, 0.0)
    columns = (share[:, None] * lost).sum(0) * weight.detach().float().square().sum(0)
    return columns.view(-1, channels_per_unit).sum(1)
