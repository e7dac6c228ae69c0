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


def select_probe(importance: Tensor, real: Tensor | None, row_ratio: float, token_ratio: float) -> Probe:
    """The tokens, then the rows, of largest importance.

    Tokens are ranked by ``||n[:, t]||_2`` over all rows; rows by the same norm over the tokens just kept. Padding
    has no importance, is never counted and never selected: a batch gives the same probe with and without it.
    Shapes depend on (B, S) alone, so the selection compiles into a static graph.

    Args:
        importance: (B, S) float32, see :func:`token_norms`.
        real: (B, S) bool, True at real tokens; None where there is no padding.
        row_ratio: fraction of rows in the probe.
        token_ratio: fraction of tokens in the probe.
    """
    num_rows, num_tokens = importance.shape
    if real is None:
        tokens = largest(torch.linalg.vector_norm(importance, dim=0), probe_tokens(num_tokens, token_ratio))
        if len(tokens) <= FEW_TOKENS:
            tokens = torch.cat([tokens.new_zeros(1), tokens[1:]])
        rows = largest(torch.linalg.vector_norm(importance[:, tokens], dim=1), probe_rows(num_rows, row_ratio))
        return Probe(rows, tokens)
    return _select_among_real(importance.masked_fill(~real, 0.0), real, row_ratio, token_ratio)


def _select_among_real(importance: Tensor, real: Tensor, row_ratio: float, token_ratio: float) -> Probe:
    """The padded case: as many places are selected as without padding, the ones too many are marked not real."""
    num_rows, num_tokens = importance.shape
    real_columns, real_rows = real.any(0), real.any(1)
    token_count = real_count(real_columns, token_ratio, minimum=2)
    tokens, token_valid = largest_valid(
        torch.linalg.vector_norm(importance, dim=0), real_columns, probe_tokens(num_tokens, token_ratio), token_count
    )
    first_real = real_columns.int().argmax()
    lowest = torch.where(token_count <= FEW_TOKENS, first_real, tokens[0])
    tokens = torch.cat([lowest[None], tokens[1:]])
    row_importance = torch.linalg.vector_norm(importance[:, tokens] * token_valid, dim=1)
    row_count = real_count(real_rows, row_ratio, minimum=1)
    rows, row_valid = largest_valid(row_importance, real_rows, probe_rows(num_rows, row_ratio), row_count)
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
