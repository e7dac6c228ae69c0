"""Running the beginning that a question's rows share only once.

For models whose layers treat every token of every row alike, dense or statically pruned, this gives the same states as
running whole rows. A dynamic method comes here only where it is to choose on contexts: the beginnings are its prompt,
and what follows is run under the choice that they made.

Shapes: G beginnings, P tokens of the longest, I inputs, T tokens of the longest remainder, D hidden size.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from pp_lightning.caches import CACHE
from pp_lightning.commonsense.batching import RowBatch
from pp_lightning.errors import UserError

# Two passes over fewer tokens cost more launches than one: below this saving whole rows are run.
_WORTHWHILE = 0.9


class Pass(NamedTuple):
    """What one pass of the decoder is given, each (rows, tokens) int64. The mask also covers the cache."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor


def worth_sharing(batch: RowBatch, config: PreTrainedConfig) -> bool:
    """Whether beginnings can be shared in this batch, and enough tokens are saved."""
    shared = batch["prefix_tokens"]
    longest = batch["input_ids"].shape[1]
    sliding = getattr(config, "sliding_window", None)
    if int(shared.min()) < 1 or (sliding is not None and sliding <= longest):
        return False
    remainders = batch["attention_mask"].sum(1) - shared[batch["prefix_of_input"]]
    tokens = len(shared) * int(shared.max()) + len(remainders) * int(remainders.max())
    return tokens < _WORTHWHILE * batch["input_ids"].numel()


def with_prompts(batch: RowBatch) -> RowBatch:
    """The same rows, whose beginnings are what a dynamic method chooses on; nothing that is scored is in them.

    It is what the rows of a question have in common in front of the position that predicts the first scored token. In
    WinoGrande that ends where the options differ. Rows with nothing in common have a beginning of their own, up to that
    position; it may be empty, and then has no say in the choice.
    """
    shared, owner, rows = batch["prefix_tokens"], batch["prefix_of_input"], batch["row_input"]
    whole = torch.full_like(owner, batch["input_ids"].shape[1])
    first = whole.scatter_reduce(0, rows[batch["target_row"]], batch["target_position"], "amin")
    together = shared[owner] > 0
    alone = len(shared) + torch.arange(len(owner), device=owner.device)
    names, groups = torch.where(together, owner, alone).unique(return_inverse=True)
    tokens = torch.zeros_like(names).scatter_(0, groups, torch.where(together, shared[owner], first))
    if int(tokens.max()) < 1:
        raise UserError("a batch has no context in front of its answers: use a larger batch size, or choose_on=row")
    return {**batch, "prefix_of_input": groups, "prefix_tokens": tokens}


def continuation_states(decoder: nn.Module, batch: RowBatch, device: torch.device) -> Tensor:
    """The states that predict the batch's continuation tokens, (K, D)."""
    first, second = beginnings(batch), remainders(batch)
    cache = decoder(**_on(device, first), use_cache=True)[CACHE]
    cache.batch_select_indices(batch["prefix_of_input"].to(device))
    hidden = decoder(**_on(device, second), **{CACHE: cache}, use_cache=True).last_hidden_state
    inputs = batch["row_input"][batch["target_row"]]
    columns = batch["target_position"] - batch["prefix_tokens"][batch["prefix_of_input"]][inputs]
    states: Tensor = hidden[inputs.to(device), columns.to(device)]
    return states


def beginnings(batch: RowBatch) -> Pass:
    """The first pass, (G, P): padded on the left, so that each remainder follows its beginning without a gap."""
    shared, owner = batch["prefix_tokens"], batch["prefix_of_input"]
    some_input = torch.empty_like(shared).index_copy_(0, owner.flip(0), torch.arange(len(owner)).flip(0).to(owner))
    positions = torch.arange(int(shared.max())).to(shared) - (shared.max() - shared)[:, None]
    mask = (positions >= 0).long()
    positions = positions.clamp(min=0)
    return Pass(batch["input_ids"][some_input].gather(1, positions), mask, positions)


def remainders(batch: RowBatch) -> Pass:
    """The second pass, (I, T): padded on the right. Its mask is (I, P + T)."""
    shared = batch["prefix_tokens"][batch["prefix_of_input"]]
    lengths = batch["attention_mask"].sum(1)
    columns = torch.arange(int((lengths - shared).max())).to(shared)
    positions = shared[:, None] + columns
    mask = (positions < lengths[:, None]).long()
    positions = torch.minimum(positions, lengths[:, None] - 1)  # padding repeats the last token, which is masked
    whole = torch.cat([beginnings(batch).attention_mask[batch["prefix_of_input"]], mask], dim=1)
    return Pass(batch["input_ids"].gather(1, positions), whole, positions)


def _on(device: torch.device, given: Pass) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in given._asdict().items()}
