"""A bound of lse that is there before the first logit.

Every split of the vocabulary tests its entries against it until its own sum is larger. Without one
the splits of 8192 tokens let through 16 times the entries that are kept (Qwen2.5, ``eps`` 2^-12);
with it twice as many.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bft_kernels.backends.torch.forward import squared_norms
from bft_kernels.backends.torch.matmul import Products
from bft_kernels.backends.triton.device import transform
from bft_kernels.backends.triton.inputs import Inputs


@triton.jit
def _floor_kernel(
    hidden_ptr,  # [N, D]
    weight_ptr,  # [V, D]
    bias_ptr,  # [V]
    target_ptr,  # [N]
    order_ptr,  # [N]
    count_ptr,  # [1]
    floor_ptr,  # [N]
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
    z = transform(total - 1e-5 * size, bias, inverse_temperature, softcap, HAS_BIAS, HAS_CAP)
    if HAS_CAP:
        z -= 1e-5 * softcap * inverse_temperature
    tl.store(floor_ptr + row, z - 1e-5 * tl.abs(z))


# How many of the batch's targets lend their columns. 2048 would let through a tenth less.
POPULAR = 1024


def popular_columns(inputs: Inputs, few: int) -> Tensor:
    """``[few]`` int64, ascending, some repeated: targets of labelled rows at even distances.

    What tokens of the batch are labelled with, others are likely to be labelled with too.
    """
    sample = torch.arange(few, device=inputs.target.device) * inputs.rows.count // max(1, few)
    labels = inputs.target[inputs.rows.order[sample]]
    return labels.clamp(0, inputs.shape[1] - 1).sort().values


def find_floors(inputs: Inputs) -> Tensor:
    """``[N]`` float32, defined for labelled rows: lower bounds of lse."""
    count, vocabulary, width = inputs.shape
    floors = torch.empty(count, device=inputs.hidden.device)
    block = min(1024, triton.next_power_of_2(width))
    _floor_kernel[(count,)](floor_ptr=floors, V=vocabulary, BLOCK_D=block, **inputs.arguments())
    if count == 0:
        return floors
    popular = _sums_over(inputs, popular_columns(inputs, min(POPULAR, count)))
    # A logit that is not finite is the business of the rows and columns that have it.
    return torch.where(popular.isfinite(), torch.maximum(floors, popular), floors)


def _sums_over(inputs: Inputs, columns: Tensor) -> Tensor:
    """``[N]``: a lower bound of the logsumexp over ``columns [K]``, repeated ones counted once."""
    config, (count, _, width) = inputs.config, inputs.shape
    few = columns.numel()
    weight = inputs.weight[columns]
    bias = None if inputs.bias is None else inputs.bias[columns].float()
    repeated = torch.nn.functional.pad(columns[1:] == columns[:-1], (1, 0))[:few]
    products = Products(weight, config.operand_dtype, torch.float32, max(1, few))
    # The vendor's product is not the tiles': by what either can be wrong, as a part of |h| |w|.
    inexact = config.operand_dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    unit = 2**-9 if inexact else 1e-5
    longest = squared_norms(weight, torch.float32, config.max_buffer_bytes).max().sqrt()
    found = torch.empty(count, device=columns.device)
    step = max(1, config.max_buffer_bytes // (16 * max(few, width)))
    for first in range(0, count, step):
        rows = inputs.hidden[first : first + step]
        z = torch.empty(rows.shape[0], few, device=columns.device)
        products.logits(products.rows(rows), z)
        if bias is not None:
            z += bias
        if config.softcap is not None:
            z.div_(config.softcap).tanh_().mul_(config.softcap)
        z.masked_fill_(repeated, -torch.inf)
        margin = unit * longest * torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
        found[first : first + step] = (z / config.temperature).logsumexp(1)
        found[first : first + step] -= margin / config.temperature
    return found - 1e-5 * found.abs() - 1e-5
