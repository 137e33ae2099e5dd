"""A lower bound of lse that is known before the first logit; see ``common.lse_bound``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bft_kernels.backends.common.inputs import Inputs
from bft_kernels.backends.common.lse_bound import raise_bounds
from bft_kernels.backends.triton.device import ROUNDING, transform
from bft_kernels.backends.triton.inputs import arguments_of


@triton.jit
def _lse_bound_kernel(
    x,
    call,
    lse_bound_ptr,  # [N]
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """A lower bound of each row's lse: its target's logit minus the largest rounding error.

    Until a program arrives at a confident token's target, this keeps the other entries out.
    """
    if tl.program_id(0) >= tl.load(call.count_ptr):
        return
    row = tl.load(call.order_ptr + tl.program_id(0))
    target = tl.minimum(tl.maximum(tl.load(call.target_ptr + row), 0), call.V - 1)
    hidden_row = x.hidden_ptr + row * x.stride_hn
    weight_row = x.weight_ptr + target * x.stride_wv
    total = 0.0
    size = 0.0
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        h = tl.load(hidden_row + offs_d, mask=offs_d < D, other=0.0).to(OPERAND)
        w = tl.load(weight_row + offs_d, mask=offs_d < D, other=0.0).to(OPERAND)
        product = h.to(tl.float32) * w.to(tl.float32)
        total += tl.sum(product, axis=0)
        size += tl.sum(tl.abs(product), axis=0)
    bias = 0.0
    if call.bias_ptr is not None:
        bias = tl.load(call.bias_ptr + target).to(tl.float32)
        size += tl.abs(bias)
    z = transform(total - ROUNDING * size, bias, call)
    if call.softcap is not None:
        z -= ROUNDING * call.softcap * call.inverse_temperature
    tl.store(lse_bound_ptr + row, z - ROUNDING * tl.abs(z))


def find_bounds(inputs: Inputs) -> Tensor:
    """``[N]`` float32: lower bounds of lse, defined for labelled rows."""
    count, _, width = inputs.shape
    lse_bounds = torch.empty(count, dtype=torch.float32, device=inputs.hidden.device)
    block = min(1024, triton.next_power_of_2(width))
    _lse_bound_kernel[(count,)](lse_bound_ptr=lse_bounds, BLOCK_D=block, **arguments_of(inputs))
    return raise_bounds(lse_bounds, inputs)
