"""Dynamic pruning as one graph: probe, choice, slices and history inside, the history going in and out."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from export.graph import Graph, attention_for_graphs, traced
from pp_lightning.architectures import architecture_of
from pp_lightning.errors import UserError
from pp_lightning.pruning import pruners_of, pruning_of


def trace_dynamic(model: PreTrainedModel, rows: int, tokens: int) -> Graph:
    """Trace a dynamically pruned model for batches of one size.

    The graph takes ``input_ids`` and ``attention_mask``, both (B, S), and a history (P_max, C) for every block that
    chooses. It gives ``logits`` (B, S, V), the histories after the batch, and the units (K,) that each block kept. It
    holds no state: whoever forgets to feed a history back runs every batch on the calibrated one.

    Args:
        model: pruned by a dynamic method; left as it is.
        rows: B, at least 2.
        tokens: S, at least 2. The probe's size follows from both, so that they are part of the graph.

    Raises:
        UserError: the model is not pruned by a dynamic method, or the batch does not fit its histories.
    """
    context = pruning_of(model).context
    if context is None:
        raise UserError("the choice is static: export the graph of a static choice")
    if context.num_positions is not None and tokens > context.num_positions:
        raise UserError(f"batches of {tokens} tokens are longer than the {context.num_positions} calibrated positions")
    state = PrunedState(model)
    ids = torch.zeros(rows, tokens, dtype=torch.long, device=model.device)
    histories = [state.buffers[name].clone() for name in state.histories]
    choice = context.choice
    with attention_for_graphs(model):
        program = traced(_WithHistory(state), (ids, torch.ones_like(ids), histories), None)
    context.choice = choice
    return Graph(
        program,
        leading=2,
        inputs=("input_ids", "attention_mask", *(f"history.{name}" for name in state.labels(state.histories))),
        outputs=(
            "logits",
            *(f"new_history.{name}" for name in state.labels(state.histories)),
            *(f"kept.{name}" for name in state.labels(state.choices)),
        ),
    )


class PrunedState:
    """A pruned model's buffers that change from batch to batch, by their names in the model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        architecture = architecture_of(model.config)
        prefix = f"{architecture.decoder}.{architecture.layers}"
        self.histories: list[str] = []
        self.choices: list[str] = []
        for layer, pruner in pruners_of(model).items():
            for name, block in (("attention", pruner.attention), ("mlp", pruner.mlp)):
                if not block.chooses:
                    continue
                self.choices.append(f"{prefix}.{layer}.pruner.{name}.kept")
                if block.history is not None:
                    self.histories.append(f"{prefix}.{layer}.pruner.{name}.history")
        self.buffers = {
            name: buffer for name, buffer in model.named_buffers() if name in {*self.histories, *self.choices}
        }

    @staticmethod
    def labels(names: Sequence[str]) -> list[str]:
        """``3.mlp`` for the buffer of layer 3's MLP block."""
        return [f"{parts[-4]}.{parts[-2]}" for parts in (name.split(".") for name in names)]


class _WithHistory(nn.Module):
    """Tensors in, tensors out: the buffers are swapped for arguments while the model runs."""

    def __init__(self, state: PrunedState) -> None:
        super().__init__()
        self.model = state.model
        self._state = (state,)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, histories: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Logits, new histories, kept units."""
        state = self._state[0]
        moving = dict(zip(state.histories, (history.clone() for history in histories), strict=True))
        chosen = {name: state.buffers[name].clone() for name in state.choices}
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        output = functional_call(self.model, {**moving, **chosen}, (), inputs)
        return (output.logits, *moving.values(), *chosen.values())
