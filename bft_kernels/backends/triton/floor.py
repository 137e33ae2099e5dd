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

from bft_kernels.backends.triton.configs import listed_tile, precision_for
from bft_kernels.backends.triton.device import finite_or, logit_tile, swizzle, transform
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


@triton.jit(do_not_specialize=["rows", "columns"])
def _popular_kernel(
    hidden_ptr,  # [N, D]
    weight_ptr,  # [V, D]
    bias_ptr,  # [V]
    target_ptr,  # [N]
    order_ptr,  # [N]
    count_ptr,  # [1]
    columns_ptr,  # [K] int64, ascending
    parts_ptr,  # [tiles of K, N]
    rows,  # N
    columns,  # K
    V,
    stride_hn,
    stride_wv,
    inverse_temperature,
    softcap,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``logsumexp`` of each row over a tile of the listed columns, repeated ones counted once."""
    tiles = tl.cdiv(columns, BLOCK_V)
    block, tile = swizzle(tl.program_id(0), tl.cdiv(rows, BLOCK_N), tiles, GROUP)
    count = tl.load(count_ptr)
    if block * BLOCK_N >= count:
        return
    local = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = local < count
    row = tl.load(order_ptr + local, mask=mask_n, other=0)
    place = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    column = tl.load(columns_ptr + place, mask=place < columns, other=0)
    before = tl.load(columns_ptr + place - 1, mask=(place > 0) & (place < columns), other=-1)
    z = logit_tile(
        hidden_ptr + row[:, None] * stride_hn,
        weight_ptr,
        bias_ptr,
        column,
        V,
        stride_wv,
        inverse_temperature,
        softcap,
        D,
        BLOCK_N,
        BLOCK_V,
        BLOCK_D,
        HAS_BIAS,
        HAS_CAP,
        OPERAND,
        PRECISION,
    )
    z = tl.where(((place < columns) & (column != before))[None, :], z, float("-inf"))
    m = tl.max(z, axis=1)
    total = tl.sum(tl.exp(z - finite_or(m, 0.0)[:, None]), axis=1)
    tl.store(parts_ptr + tile.to(tl.int64) * rows + row, m + tl.log(total), mask=mask_n)


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
    columns = popular_columns(inputs, min(POPULAR, count))
    few = columns.numel()
    tile = listed_tile()
    tiles = triton.cdiv(few, tile.block_v)
    parts = torch.empty(tiles, count, device=floors.device)
    _popular_kernel[(triton.cdiv(count, tile.block_n) * tiles,)](
        columns_ptr=columns,
        parts_ptr=parts,
        rows=count,
        columns=few,
        V=vocabulary,
        PRECISION=precision_for(inputs.config.operand_dtype),
        **inputs.arguments(),
        **tile.constants(),
    )
    popular = parts.logsumexp(0)
    popular = popular - 1e-5 * popular.abs() - 1e-5
    # A logit that is not finite is the business of the rows and columns that have it.
    return torch.where(popular.isfinite(), torch.maximum(floors, popular), floors)
