"""FLOPs of whole layers as torch counts them, on a model without memory for its weights: for parts without a formula.

Linear attention, routers, routed experts, latent attention. Products count as they do in :mod:`pp_lightning.flops`:
attention is computed eagerly, all S x S of it, and a routed expert on the tokens that it is sent.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pp_lightning.caches import CACHE
from pp_lightning.errors import UserError
from pp_lightning.families import layers_of, random_inputs
from pp_lightning.interfaces import without_head


@lru_cache(maxsize=256)
def counted_flops(make: Callable[[], nn.Module], rows: int, tokens: int, past: int = 0) -> int:
    """FLOPs of all layers on S tokens a row, B rows.

    Args:
        make: makes the model. Equal ones make equal models: what was counted is remembered.
        rows: B.
        tokens: S.
        past: tokens in the cache in front of them, if any.

    Raises:
        UserError: what the layers compute depends on the data.
    """
    model: Any = make().eval()
    model.set_attn_implementation("eager")
    model.set_experts_implementation("batched_mm")  # on top-k experts a token, whichever they are
    run, given = without_head(model), random_inputs(model, rows, tokens)
    try:
        with torch.no_grad():
            if past:
                given[CACHE] = run(**random_inputs(model, rows, past), use_cache=True)[CACHE]
            return _flops_of(layers_of(model), lambda: run(**given))
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"the FLOPs of {model.config.model_type} cannot be counted: what its layers compute depends on the data"
        ) from error


def _flops_of(layers: Any, run: Callable[[], object]) -> int:
    tolls: list[int] = []  # what the counter shows, taken off on the way into a layer and added on the way out
    with FlopCounterMode(display=False) as counter:
        for layer in layers:
            layer.register_forward_pre_hook(lambda *_: tolls.append(-counter.get_total_flops()))
            layer.register_forward_hook(lambda *_: tolls.append(counter.get_total_flops()))
        run()
    return sum(tolls)
