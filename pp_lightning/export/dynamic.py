"""Dynamic pruning as one graph: probe, choice, slices and history inside, the history going in and out."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from pp_lightning.errors import UserError
from pp_lightning.export.graph import Graph, attention_for_graphs, traced
from pp_lightning.functional.selection import take_rows
from pp_lightning.methods import DynamicMethod
from pp_lightning.pruned.context import ModelContext
from pp_lightning.pruning import last_choices, pruning_of


def trace_dynamic(model: PreTrainedModel, rows: int, tokens: int) -> Graph:
    """Trace a dynamically pruned model for batches of one size.

    The graph takes ``input_ids`` and ``attention_mask``, both (B, S), and a history (P_max, C) for every block that
    chooses (with some methods a running mean (C,) too). It gives ``logits`` (B, S, V), the histories after the batch,
    and the units (K,) that each block kept. It holds no state: whoever forgets to feed a history back runs every batch
    on the calibrated one.

    The probe's size follows from ``rows`` and ``tokens``, at least 2 each, so that they are part of the graph.

    Raises:
        UserError: the model is not pruned by a dynamic method, or the batch does not fit its histories.
    """
    pruning = pruning_of(model)
    context = pruning.context
    if context is None or not isinstance(pruning.method, DynamicMethod):
        raise UserError("the choice is static: export the graph of a static choice")
    if context.num_positions is not None and tokens > context.num_positions:
        raise UserError(f"batches of {tokens} tokens are longer than the {context.num_positions} calibrated positions")
    if pruning.method.samples_needed(rows, tokens):
        raise UserError("a probe that is drawn anew for every batch fits no graph: rank it by residual or input")
    if pruning.method.weighs_tokens:
        raise UserError(
            "a graph has no attention weights to rank a probe by: export ProbePruning, or freeze the choice"
        )
    state = {label: tensor.clone() for label, tensor in context.tensors().items()}
    ids = torch.zeros(rows, tokens, dtype=torch.long, device=model.device)
    last = context.last
    with attention_for_graphs(model):
        program = traced(_WithHistory(model, context), (ids, torch.ones_like(ids), list(state.values())), None)
    ours = {torch.ops.pp_lightning.gather_units.default: take_rows}
    program = program.run_decompositions(ours)
    context.last = last
    return Graph(
        program,
        leading=2,
        inputs=("input_ids", "attention_mask", *state),
        outputs=("logits", *(f"new_{label}" for label in state), *(f"kept.{i}.{b.value}" for i, b in pruning.pruners)),
    )


class _WithHistory(nn.Module):
    """Tensors in, tensors out: the buffers are swapped for arguments while the model runs."""

    def __init__(self, model: PreTrainedModel, context: ModelContext) -> None:
        super().__init__()
        self.model = model
        paths = {id(buffer): path for path, buffer in model.named_buffers()}
        self._paths = [paths[id(tensor)] for tensor in context.tensors().values()]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, before: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Logits, what the next batch starts from, kept units."""
        swapped = dict(zip(self._paths, (tensor.clone() for tensor in before), strict=True))
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        output = functional_call(self.model, swapped, (), inputs)
        return (output.logits, *swapped.values(), *(choice.kept for choice in last_choices(self.model).values()))
