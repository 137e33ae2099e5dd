"""A bound of lse that is there before the first logit; see ``common.lse_bound``."""

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
    hidden_ptr,  # [N, D]
    weight_ptr,  # [V, D]
    bias_ptr,  # [V]
    target_ptr,  # [N]
    order_ptr,  # [N]
    count_ptr,  # [1]
    lse_bound_ptr,  # [N]
    V,
    stride_hn,
    stride_wv,
    inverse_temperature,
    softcap,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """A lower bound of each row's lse: its target's logit, less what rounding can make of it.

    Until a program arrives at a confident token's target, this keeps the other entries out.
    """
    if tl.program_id(0) >= tl.load(count_ptr):
        return
    row = tl.load(order_ptr + tl.program_id(0))
    target = tl.minimum(tl.maximum(tl.load(target_ptr + row), 0), V - 1)
    total = 0.0
    size = 0.0
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        h = tl.load(hidden_ptr + row * stride_hn + offs_d, mask=offs_d < D, other=0.0).to(OPERAND)
        w = tl.load(weight_ptr + target * stride_wv + offs_d, mask=offs_d < D, other=0.0)
        product = h.to(tl.float32) * w.to(OPERAND).to(tl.float32)
        total += tl.sum(product, axis=0)
        size += tl.sum(tl.abs(product), axis=0)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + target).to(tl.float32)
        size += tl.abs(bias)
    z = transform(total - ROUNDING * size, bias, inverse_temperature, softcap, HAS_BIAS, HAS_CAP)
    if HAS_CAP:
        z -= ROUNDING * softcap * inverse_temperature
    tl.store(lse_bound_ptr + row, z - ROUNDING * tl.abs(z))


def find_bounds(inputs: Inputs) -> Tensor:
    """``[N]`` float32, defined for labelled rows: lower bounds of lse."""
    count, vocabulary, width = inputs.shape
    lse_bounds = torch.empty(count, dtype=torch.float32, device=inputs.hidden.device)
    block = min(1024, triton.next_power_of_2(width))
    _lse_bound_kernel[(count,)](
        lse_bound_ptr=lse_bounds, V=vocabulary, BLOCK_D=block, **arguments_of(inputs)
    )
    return raise_bounds(lse_bounds, inputs)
