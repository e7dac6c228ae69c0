"""Proof that a dynamic graph chooses, computes and remembers what the model does, batch after batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pp_lightning.errors import UserError
from pp_lightning.export.formats import Session
from pp_lightning.export.verify import Agreement, tolerance
from pp_lightning.pruning import last_choices
from pp_lightning.state import kept_state, pruning_state

_BATCHES = 3

# Two runtimes round differently, and where two units score alike but for rounding each may keep another. That is rare,
# and what it changes is small; a graph that chooses wrongly differs in most units.
_SWAPS, _AFTER_A_SWAP = 1e-3, 1e-2


@dataclass(frozen=True)
class DynamicBehaviour:
    """What a dynamically pruned model answers to a few batches in a row, its history moving.

    Attributes:
        batches: token ids and mask, each (B, S); the second batch has padding.
        logits: (B, S, V) float32 of each.
        kept: units that each block kept, for each batch.
        histories: after the last batch.
    """

    batches: list[tuple[Tensor, Tensor]]
    logits: list[Tensor]
    kept: list[list[Tensor]]
    histories: list[Tensor]

    @staticmethod
    @torch.no_grad()
    def of(model: PreTrainedModel, rows: int, tokens: int) -> "DynamicBehaviour":
        """Run a model; its history is put back afterwards."""
        batches = [_batch(model.config.vocab_size, rows, tokens, seed) for seed in range(_BATCHES)]
        logits, kept = [], []
        with kept_state(model):
            for ids, mask in batches:
                inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
                logits.append(model(**inputs, use_cache=False).logits.float().cpu())
                kept.append([choice.kept.cpu() for choice in last_choices(model).values()])
            after = [tensor for tensor in pruning_state(model).values() if tensor.dim() > 0]
        return DynamicBehaviour(batches, logits, kept, after)

    def check(self, session: Session, histories: Sequence[Tensor], dtype: torch.dtype, num_layers: int) -> Agreement:
        """Run the graph on the same batches, feeding its histories back."""
        state, worst, swapped, allowed = list(histories), 0.0, 0, 0.0
        for (ids, mask), logits, kept in zip(self.batches, self.logits, self.kept, strict=True):
            outputs = session([ids, mask, *state])
            state, found = outputs[1 : 1 + len(state)], outputs[1 + len(state) :]
            swapped += sum(int((~torch.isin(a, b)).sum()) for a, b in zip(kept, found, strict=True))
            relative = tolerance(dtype, num_layers) if swapped == 0 else _AFTER_A_SWAP
            real = mask.bool()
            allowed = relative * max(1.0, float(logits[real].abs().max()))
            difference = float((logits - outputs[0].float())[real].abs().max())
            if not difference <= allowed:  # NaN too
                raise UserError(
                    f"the export failed its check: logits differ by {difference:.2g}, more than {allowed:.2g}"
                )
            worst = max(worst, difference)
        if swapped > _SWAPS * sum(len(units) for kept in self.kept for units in kept):
            raise UserError(f"the export failed its check: {swapped} of the kept units differ")
        self._check_histories(state)
        return Agreement(worst, allowed, swapped_units=swapped)

    def _check_histories(self, state: Sequence[Tensor]) -> None:
        for wanted, got in zip(self.histories, state, strict=True):
            off = ~torch.isclose(wanted, got, rtol=1e-3, atol=1e-6)  # kept channels move further with every batch
            if float(off.float().mean()) > _SWAPS:
                raise UserError("the export failed its check: its histories are not the model's")


def _batch(vocabulary: int, rows: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    if seed == 1:
        mask[0, : tokens // 4] = 0
    return ids, mask
