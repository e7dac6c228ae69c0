"""Which rows and tokens of a batch run ahead as the probe (01-method, section 1, steps 1 and 2)."""

from dataclasses import dataclass

import torch
from torch import Tensor

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


def select_probe(
    importance: Tensor,
    real: Tensor | None,
    row_ratio: float,
    token_ratio: float,
    sizes: tuple[int, int] | None = None,
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
    """Places the probe would have without the padding, as a 0-d int64 tensor (no host synchronisation)."""
    number = eligible.sum()
    wanted = torch.ceil(number.double() * ratio - 1e-9).long().clamp(min=minimum)
    return torch.minimum(wanted, number)
