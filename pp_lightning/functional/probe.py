"""Which rows and tokens of a batch run ahead as the probe (Probe Pruning, residual importance)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from pp_lightning.functional.budget import probe_rows, probe_tokens

# With this few tokens the probe always contains the start of the text, where attention piles up.
FEW_TOKENS = 10


@dataclass(frozen=True)
class Probe:
    """The selected part of a batch.

    Attributes:
        rows: (b,) int64, ascending.
        tokens: (s,) int64 column indices, ascending.
        real: (b, s) bool, True where the selected place holds a real token; None where everything is real.
        real_tokens: (s,) bool, False for tokens beyond what the batch without its padding would have selected; None
            like ``real``.
    """

    rows: Tensor
    tokens: Tensor
    real: Tensor | None = None
    real_tokens: Tensor | None = None

    def take(self, states: Tensor) -> Tensor:
        """The probe's part (b, s, ...) of a (B, S, ...) tensor."""
        return states[self.rows[:, None], self.tokens[None, :]]


def token_norms(states: Tensor) -> Tensor:
    """Residual importance ``||R[b, t]||_2``: (B, S, D) of any dtype to (B, S) float32."""
    return torch.linalg.vector_norm(states, dim=-1, dtype=torch.promote_types(states.dtype, torch.float32)).float()


def token_sensitivity(states: Tensor, weight_norm: Tensor) -> Tensor:
    """``sqrt(sum_d x_d^2 a_d)``: (B, S, D) of any dtype and a (D,) float32 to (B, S) float32."""
    return torch.mv(states.float().square().flatten(0, 1), weight_norm).view(states.shape[:2]).sqrt()


def select_probe(
    importance: Tensor, real: Tensor | None, row_ratio: float, token_ratio: float, sizes: tuple[int, int] | None = None
) -> Probe:
    """The tokens, then the rows, of largest importance.

    Tokens are ranked by ``||n[:, t]||_2`` over all rows; rows by the same norm over the tokens just kept. Padding
    has no importance, is never counted and never selected: a batch gives the same probe with and without it.
    Shapes depend on (B, S) alone, so the selection compiles into a static graph.

    Args:
        importance: (B, S) float32, see :func:`token_norms`.
        real: (B, S) bool, True at real tokens; None where there is no padding.
        row_ratio: fraction of rows in the probe.
        token_ratio: fraction of tokens in the probe.
        sizes: rows and tokens that these ratios give for (B, S), where the caller has them. A graph with dynamic
            sizes takes them as inputs then, which compiles several times faster than the formulas do.
    """
    num_rows, num_tokens = importance.shape
    if sizes is None:
        sizes = probe_rows(num_rows, row_ratio), probe_tokens(num_tokens, token_ratio)
    if real is None:
        tokens = largest(torch.linalg.vector_norm(importance, dim=0), sizes[1])
        if len(tokens) <= FEW_TOKENS:
            tokens = torch.cat([tokens.new_zeros(1), tokens[1:]])
        rows = largest(torch.linalg.vector_norm(importance[:, tokens], dim=1), sizes[0])
        return Probe(rows, tokens)
    return _select_among_real(importance.masked_fill(~real, 0.0), real, row_ratio, token_ratio, sizes)


def _select_among_real(
    importance: Tensor, real: Tensor, row_ratio: float, token_ratio: float, sizes: tuple[int, int]
) -> Probe:
    """The padded case: as many places are selected as without padding, the ones too many are marked not real."""
    real_columns, real_rows = real.any(0), real.any(1)
    token_count = real_count(real_columns, token_ratio, minimum=2)
    tokens, token_valid = largest_valid(
        torch.linalg.vector_norm(importance, dim=0), real_columns, sizes[1], token_count
    )
    first_real = real_columns.int().argmax()
    lowest = torch.where(token_count <= FEW_TOKENS, first_real, tokens[0])
    tokens = torch.cat([lowest[None], tokens[1:]])
    row_importance = torch.linalg.vector_norm(importance[:, tokens] * token_valid, dim=1)
    row_count = real_count(real_rows, row_ratio, minimum=1)
    rows, row_valid = largest_valid(row_importance, real_rows, sizes[0], row_count)
    selected = real[rows[:, None], tokens[None, :]]
    return Probe(rows, tokens, selected & token_valid[None, :] & row_valid[:, None], token_valid)


def largest(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest scores, ascending."""
    return scores.topk(count).indices.sort().values


def largest_valid(scores: Tensor, eligible: Tensor, count: int, valid_count: Tensor) -> tuple[Tensor, Tensor]:
    """``count`` indices, the first ``valid_count`` of them the best eligible ones in ascending order, and which are."""
    best = scores.masked_fill(~eligible, -1.0).topk(count).indices
    in_use = torch.arange(count, device=scores.device) < valid_count
    ascending = torch.where(in_use, best, len(scores)).sort().values
    return ascending.clamp(max=len(scores) - 1), in_use


def real_count(eligible: Tensor, ratio: float, minimum: int) -> Tensor:
    """TokenPositions the probe would have without the padding, as a 0-d int64 tensor (no host synchronisation)."""
    number = eligible.sum()
    wanted = torch.ceil(number.double() * ratio - 1e-9).long().clamp(min=minimum)
    return torch.minimum(wanted, number)


Arguments = dict[str, Any]


def probe_arguments(given: Arguments, probe: object) -> Arguments:
    """A block's arguments cut to the probe's rows and tokens, at their true positions.

    Args:
        given: by name, without the hidden states.
        probe: None is the whole batch.
    """
    cut = dict(given)
    mask = cut.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 4:  # a cache of fixed size has room behind the batch
        cut["attention_mask"] = mask[..., : mask.shape[2]]
    if isinstance(probe, Probe):  # anything else goes through blocks that take no arguments
        for name in _CUTS.keys() & cut.keys():
            value, take = cut[name], _CUTS[name]
            if isinstance(value, tuple):  # cosines and sines
                cut[name] = tuple(map(take, value, repeat(probe)))
            elif value is not None:
                cut[name] = take(value, probe)
    return cut


def _by_row_and_token(value: Any, probe: Probe) -> Any:
    rows = value if value.shape[0] == 1 else value.index_select(0, probe.rows)
    return rows.index_select(1, probe.tokens)


def _mask(mask: Any, probe: Probe) -> Any:
    """Of a mask (B or 1, 1 or H, S, T), bool or additive, (B, S), or one that is a function of indices."""
    if not isinstance(mask, Tensor):
        return _block_mask(mask, probe)
    if mask.dim() == 2:
        real = mask.index_select(0, probe.rows).index_select(1, probe.tokens)
        return real if probe.real_tokens is None else real * probe.real_tokens
    rows = mask if mask.shape[0] == 1 else mask.index_select(0, probe.rows)
    mask = rows.index_select(2, probe.tokens).index_select(3, probe.tokens)
    if probe.real_tokens is None:
        return mask
    if mask.dtype == torch.bool:
        return mask & probe.real_tokens
    return mask.masked_fill(~probe.real_tokens, torch.finfo(mask.dtype).min)


def _block_mask(mask: BlockMask, probe: Probe) -> BlockMask:
    """A mask of flex attention, which asks for each pair of tokens by their indices."""
    rows, tokens, real = probe.rows, probe.tokens, probe.real_tokens

    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        found = mask.mask_mod(rows[row], head, tokens[query], tokens[key])
        return found if real is None else found & real[key]

    return create_block_mask(allowed, len(rows), None, len(tokens), len(tokens), device=rows.device)


_CUTS: Mapping[str, Callable[[Any, Probe], Any]] = {
    "attention_mask": _mask,
    "position_embeddings": _by_row_and_token,
    "position_ids": _by_row_and_token,
}
