"""One backward pass over a few calibration windows, seen through hooks on the unmodified model.

No more than one gradient of the weights that are scored exists at a time, and where one batch holds all windows no more
than one matrix's: a gradient is turned into a vector and given up as soon as autograd has finished it. Activations are
recomputed layer by layer.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from pp_lightning.blocks import BlockKey
from pp_lightning.calibration_data import fingerprint
from pp_lightning.errors import UserError
from pp_lightning.families import OUTPUT, blocks_of, layers_of
from pp_lightning.functional.taylor import Taylor, taylor_importance
from pp_lightning.importances import Importances, by_role
from pp_lightning.interfaces import current_forward, replace_forward, restore_forward
from pp_lightning.methods.llm_pruner import TaylorName
from pp_lightning.methods.options import checked
from pp_lightning.progress import shown
from pp_lightning.pruning import is_pruned
from pp_lightning.shares import check_whole

IGNORED = -100  # label of a token that is not predicted
Batch = Mapping[str, Any]
Projection = tuple[BlockKey, str]  # block and role


def taylor_importances(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    taylor: Taylor | TaylorName = Taylor.PARAM_FIRST,
    *,
    layers: Sequence[int] | None = None,
    progress: bool = True,
) -> Importances:
    """Taylor importance of every row and column of the projections (LLM-Pruner).

    The loss is the mean cross-entropy of all predicted tokens of all batches.

    Args:
        model: a dense causal language model. It is run in evaluation mode and left as it was.
        batches: dictionaries with ``input_ids`` (B, S) and optionally ``attention_mask`` (B, S), 1 at real tokens, and
            ``labels`` (B, S), -100 where nothing is predicted. One batch takes the least memory.
        taylor: the variant, by itself or by name, as :class:`~pp_lightning.methods.LLMPruner` has it. ``param_second``
            takes one pass a row; ``param_mix`` one more, and keeps the squares.
        layers: only these layers; None takes all.
        progress: show a progress bar; lines where there is no terminal.

    Raises:
        UserError: no batches, a pruned or unknown model, no such variant, or a loss or gradients that are not finite.
    """
    taylor = Taylor(checked("taylor", taylor, [variant.value for variant in Taylor]))
    if is_pruned(model):
        raise UserError("importances are collected on the dense model: unprune_ it first")
    check_whole(model, "a gradient")
    if not batches:
        raise UserError("no calibration batches")
    projections = projections_of(model, layers)
    total = sum(int((labels_of(batch)[:, 1:] != IGNORED).sum()) for batch in batches)
    collector = _Collector(projections, taylor)
    with frozen_except(model, list(projections.values())), recomputed(model), collector.attached():
        if taylor.uses_squares:
            rows = [row for batch in batches for row in _rows(batch)]
            collector.samples = len(rows)
            for row in shown(rows, "squared gradients", "window", progress):
                _finite(next_token_loss(model, row)).backward()
        collector.samples = None
        if taylor.uses_gradient:
            for index, batch in enumerate(shown(batches, "gradients", "batch", progress)):
                collector.last = index == len(batches) - 1
                share = int((labels_of(batch)[:, 1:] != IGNORED).sum()) / total
                (_finite(next_token_loss(model, batch)) * share).backward()
    return Importances(fingerprint(model), taylor.value, collector.members())


class _Collector:
    """Turns the gradient of each weight into a vector, and gives it up."""

    def __init__(self, projections: Mapping[Projection, nn.Parameter], taylor: Taylor) -> None:
        self.projections = projections
        self.taylor = taylor
        self.samples: int | None = None  # while passes are of single rows, how many there are
        self.last = False  # whether gradients are complete after this pass
        self._squares: dict[Projection, Tensor] = {}
        self._vectors: dict[Projection, Tensor] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Watch every weight's gradient."""
        hooks = [
            weight.register_post_accumulate_grad_hook(partial(self._add, projection))
            for projection, weight in self.projections.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for weight in self.projections.values():
                weight.grad = None

    def members(self) -> dict[BlockKey, Mapping[str, Tensor]]:
        """The vectors by block and role, on the CPU."""
        members: dict[BlockKey, dict[str, Tensor]] = {}
        for key, role in self.projections:
            members.setdefault(key, {}).update(by_role(role, self._vectors[key, role].cpu()))
        return dict(members)

    @torch.no_grad()
    def _add(self, projection: Projection, weight: nn.Parameter) -> None:
        gradient = weight.grad
        assert gradient is not None
        if self.samples is not None:
            weight.grad = None
            self._add_squares(projection, weight, gradient.float().square() / self.samples)
        elif self.last:
            weight.grad = None
            self._vectors[projection] = self._vector(projection, weight, gradient, self._squares.pop(projection, None))

    def _add_squares(self, projection: Projection, weight: Tensor, squares: Tensor) -> None:
        if self.taylor.uses_gradient:  # the difference of both needs the whole sum, element by element
            known = self._squares.get(projection)
            self._squares[projection] = squares if known is None else known.add_(squares)
            return
        vector = self._vector(projection, weight, None, squares)  # of one sign: sums of rows add up to rows of sums
        known = self._vectors.get(projection)
        self._vectors[projection] = vector if known is None else known + vector

    def _vector(
        self, projection: Projection, weight: Tensor, gradient: Tensor | None, squares: Tensor | None
    ) -> Tensor:
        (layer, block), role = projection
        vector = taylor_importance(weight, gradient, squares, self.taylor, of_outputs=role != OUTPUT)
        if not torch.isfinite(vector).all():
            raise UserError(
                f"gradients in the {block.value} block of layer {layer} are not finite: use float32 or bfloat16"
            )
        return vector


def projections_of(model: PreTrainedModel, layers: Sequence[int] | None = None) -> dict[Projection, nn.Parameter]:
    """The weights of both blocks of some layers (None: of all), by block and role."""
    found: dict[Projection, nn.Parameter] = {}
    for key, modules in blocks_of(model).items():
        if layers is None or key[0] in layers:
            for name in modules.names:
                weight = modules.projection(name).weight
                assert isinstance(weight, nn.Parameter)
                found[key, modules.role(name)] = weight
    return found


def next_token_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Mean cross-entropy of the predicted tokens of a batch, 0-d float32."""
    names = ("input_ids", "attention_mask")
    inputs = {name: batch[name].to(model.device) for name in names if name in batch}
    loss: Tensor = model(**inputs, labels=labels_of(batch).to(model.device), use_cache=False).loss
    return loss


def labels_of(batch: Batch) -> Tensor:
    """The batch's labels (B, S); without any, every real token is predicted."""
    if "labels" in batch:
        return batch["labels"]
    ids: Tensor = batch["input_ids"]
    return ids if "attention_mask" not in batch else ids.masked_fill(batch["attention_mask"] == 0, IGNORED)


@contextmanager
def frozen_except(model: PreTrainedModel, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """In evaluation mode, with gradients of these weights only; afterwards as before."""
    before, was_training = {p: p.requires_grad for p in model.parameters()}, model.training
    model.eval().requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)
        model.train(was_training)


@contextmanager
def recomputed(model: PreTrainedModel) -> Iterator[None]:
    """Keep no activations inside the decoder layers: the backward pass runs each layer forward again.

    transformers' own switch for this works in training mode only, where dropout would be active.
    """
    layers = layers_of(model)
    for layer in layers:
        replace_forward(layer, partial(checkpoint, current_forward(layer), use_reentrant=False))
    try:
        yield
    finally:
        for layer in layers:
            restore_forward(layer)


def _rows(batch: Batch) -> Iterator[Batch]:
    for row in range(batch["input_ids"].shape[0]):
        yield {name: values[row : row + 1] for name, values in batch.items()}


def _finite(loss: Tensor) -> Tensor:
    if not torch.isfinite(loss):
        raise UserError(
            "the loss on the calibration text is not finite: check the checkpoint, or use float32 or bfloat16"
        )
    return loss
