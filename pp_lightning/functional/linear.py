"""Linear maps, by the kernel that is fastest for their shape."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from pp_lightning.functional.tracing import is_traced

# Up to so many tokens oneDNN multiplies float32 matrices faster than torch does by default on a CPU: by a quarter at
# 32 tokens. A probe is that thin.
THIN = 64

_ONEDNN = torch.backends.mkldnn.is_available()

# Types that this machine's CPU has arithmetic for; others are emulated.
_NATIVE: Mapping[torch.dtype, bool] = {
    torch.bfloat16: _ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    torch.float16: _ONEDNN and torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}


def is_emulated(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this machine computes in ``dtype`` without arithmetic for it, far slower than in float32."""
    return device.type == "cpu" and not _NATIVE.get(dtype, True)


def wants_rows(weight: Tensor) -> bool:
    """Whether a product with ``weight`` is only fast where it is stored by rows.

    So it is in half precision on a CPU without arithmetic for it: by columns it takes ten times as long there, and a
    copy far less.
    """
    return is_emulated(weight.dtype, weight.device) and not torch.compiler.is_exporting()


def linear(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``states @ weight.T + bias``: (..., in) to (..., out)."""
    if states.device.type != "cpu" or torch.compiler.is_exporting():
        return F.linear(states, weight, bias)
    if is_emulated(weight.dtype, weight.device):
        weight = weight.contiguous()  # see wants_rows
    thin = states.dtype == weight.dtype == torch.float32 and states.numel() <= THIN * states.shape[-1]
    if not (thin and _ONEDNN) or torch.is_grad_enabled() or not weight.is_contiguous():
        return F.linear(states, weight, bias)
    if is_traced():
        product: Tensor = thin_linear(states, weight, bias)
    else:
        product = torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
    return product


@torch.library.custom_op("pp_lightning::thin_linear", mutates_args=())
def thin_linear(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """OneDNN's product; one operator to a compiler, which has no lowering for weights that are not frozen."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
    return product


@thin_linear.register_fake
def _(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return states.new_empty(*states.shape[:-1], weight.shape[0])


@register_flop_formula([torch.ops.pp_lightning.thin_linear, *([torch.ops.mkldnn._linear_pointwise] if _ONEDNN else [])])
def _flops(states: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * states.numel() * weight[0]
