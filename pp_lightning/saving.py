"""What transformers' own ways out of a model do where it is pruned: write what they say they write, or refuse."""

import warnings
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from pp_lightning.errors import UserError

_SAVE, _BATCHES = (
    "save_pretrained",
    ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"),
)


def guard(model: PreTrainedModel, *, dynamic: bool, narrow_heads: bool) -> None:
    """Put our word in front of the methods of one model object: copies and pickles of it have it too."""
    setattr(model, _SAVE, partial(_save_dense if dynamic else _refuse_to_save, model))
    if dynamic or narrow_heads:
        for name in _BATCHES:
            setattr(model, name, _refuse_packed_batches)


def release(model: PreTrainedModel) -> None:
    """Undo :func:`guard`."""
    for name in (_SAVE, *_BATCHES):
        model.__dict__.pop(name, None)


def _save_dense(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Write the dense model: pruning per batch changes no weight."""
    warnings.warn("pruning per batch changes no weight: this writes the dense model", UserWarning, stacklevel=2)
    return type(model).save_pretrained(model, *args, **kwargs)


def _refuse_to_save(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    raise UserError(
        "the config of a pruned model is the dense one's: write it with export_checkpoint() or `pp-lightning export`"
    )


def _refuse_packed_batches(*args: Any, **kwargs: Any) -> Any:
    raise UserError(
        "continuous batching packs several texts into one row, and pruned models take one text a row: use generate"
    )
