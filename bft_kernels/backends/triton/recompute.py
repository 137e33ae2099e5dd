"""The backward from recomputed logits: ``dy`` in blocks of the vocabulary, then two products.

The first kernel makes a block ``dy [R, C]`` of the logits' gradient in the operands' type, for all
rows and as many columns as the byte budget allows. The second adds ``dy @ W`` to ``dH``. The
third adds ``dy.T @ H`` to a block of rows of ``dW``. Each element of each result belongs to one
program, so there are no locks and no atomics, and two runs give the same bits. Only the device
knows the number of rows; programs whose rows lie past it return at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bft_kernels.backends.common.inputs import Inputs
from bft_kernels.backends.common.rows import KnownRows
from bft_kernels.backends.common.tiles import Recomputation
from bft_kernels.backends.triton.configs import product_tiles, tile_for
from bft_kernels.backends.triton.device import (
    dot,
    draw_bits,
    exact_factors,
    expm1_down,
    logit_tile,
    normal_exp,
    row_key,
    sampled_dz,
    slope_of,
    swizzle,
)
from bft_kernels.backends.triton.inputs import tile_arguments
from bft_kernels.results import Gradients


@triton.jit(do_not_specialize=["first_column", "columns", "rows"])
def _logit_gradient_kernel(
    x,
    call,
    seed_ptr,  # [], for the sampled gradient; None for the exact one
    lse_ptr,  # [N]
    lse_low_ptr,  # [N], or None
    nll_ptr,  # [N]
    grad_ptr,  # [N], upstream
    dy_ptr,  # [R, C]
    bias_sums_ptr,  # [row blocks, C] float32, or None
    first_column,
    columns,  # C, of which the last block may have fewer
    stride_dy,
    rows,  # R
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``upstream * dy`` of a tile, exact or sampled."""
    tiles = tl.cdiv(columns, BLOCK_V)
    block, tile = swizzle(tl.program_id(0), tl.cdiv(rows, BLOCK_N), tiles, GROUP)
    count = tl.load(call.count_ptr)
    if block * BLOCK_N >= count:
        return
    local = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = local < count
    row = tl.load(call.order_ptr + local, mask=mask_n, other=0)
    column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    offs_v = first_column + column
    mask_v = column < columns
    z = logit_tile(x, call, row, offs_v, D, BLOCK_D, OPERAND, PRECISION)

    target = tl.load(call.target_ptr + row, mask=mask_n, other=0)
    lse = tl.load(lse_ptr + row, mask=mask_n, other=0.0)
    nll = tl.load(nll_ptr + row, mask=mask_n, other=0.0)
    upstream = tl.load(grad_ptr + row, mask=mask_n, other=0.0)
    p = normal_exp(z - lse[:, None])
    at_target = offs_v.to(tl.int64)[None, :] == target[:, None]
    if seed_ptr is not None:
        multiplier, offset = row_key(tl.load(seed_ptr), row)
        bits = draw_bits(multiplier[:, None], offset[:, None], offs_v.to(tl.uint32)[None, :])
        dz = sampled_dz(p, bits, at_target, expm1_down(-nll)[:, None], call.eps)
    else:
        if lse_low_ptr is not None:
            p *= tl.exp(-tl.load(lse_low_ptr + row, mask=mask_n, other=0.0))[:, None]
        probability, even, own = exact_factors(lse, nll, call)
        dz = tl.where(at_target, own[:, None], p * probability[:, None] - even)
    dy = dz * slope_of(z, call) * upstream[:, None]
    tl.store(
        dy_ptr + local.to(tl.int64)[:, None] * stride_dy + column[None, :],
        dy.to(OPERAND),
        mask=mask_n[:, None] & mask_v[None, :],
    )
    if bias_sums_ptr is not None:
        place = block.to(tl.int64) * stride_dy + column
        sums = tl.sum(tl.where(mask_n[:, None], dy, 0.0), axis=0)
        tl.store(bias_sums_ptr + place, sums, mask=mask_v)


@triton.jit(do_not_specialize=["first_column", "columns"])
def _hidden_gradient_kernel(
    x,
    call,
    dy_ptr,  # [R, C]
    sums_ptr,  # [N, D] float32, of the blocks before
    grad_hidden_ptr,  # [N, D]
    scale_ptr,  # [], what dy was multiplied by, or None
    first_column,
    columns,
    stride_dy,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    LAST: tl.constexpr,  # a run-time number would make it spill on sm_120
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile ``[BLOCK_N, BLOCK_D]`` of ``dH``, over the columns of a block."""
    count = tl.load(call.count_ptr)
    row_blocks = tl.cdiv(count, BLOCK_N)
    total = row_blocks * tl.cdiv(D, BLOCK_D)
    index = tl.program_id(0)
    if index >= total:
        return
    local = index % row_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = local < count
    row = tl.load(call.order_ptr + local, mask=mask_n, other=0)
    offs_d = index // row_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = mask_n[:, None] & (offs_d < D)[None, :]
    place = row[:, None] * D + offs_d[None, :]
    dy_rows = dy_ptr + local.to(tl.int64)[:, None] * stride_dy
    sums = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, columns, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        dy = tl.load(dy_rows + column[None, :], mask=mask_n[:, None], other=0.0)
        offs_v = tl.minimum(first_column + column, call.V - 1)  # beyond columns dy is 0
        w = tl.load(
            x.weight_ptr + offs_v.to(tl.int64)[:, None] * x.stride_wv + offs_d[None, :],
            mask=(offs_d < D)[None, :],
            other=0.0,
        )
        sums = dot(dy, w, sums, OPERAND, PRECISION)
    if scale_ptr is not None:
        sums /= tl.load(scale_ptr)
    sums += tl.load(sums_ptr + place, mask=mask & (first_column > 0), other=0.0)
    if LAST:
        tl.store(grad_hidden_ptr + place, sums, mask=mask)
    else:
        tl.store(sums_ptr + place, sums, mask=mask)


@triton.jit(do_not_specialize=["first_column", "columns"])
def _weight_gradient_kernel(
    x,
    call,
    dy_ptr,  # [R, C]
    grad_weight_ptr,  # [V, D]
    scale_ptr,  # [], what dy was multiplied by, or None
    first_column,
    columns,
    stride_dy,
    stride_gv,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    ADDS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile ``[BLOCK_V, BLOCK_D]`` of ``dW``, over all rows; written, or with ADDS added to."""
    count = tl.load(call.count_ptr)
    if ADDS and count == 0:
        return
    tiles, slices = tl.cdiv(columns, BLOCK_V), tl.cdiv(D, BLOCK_D)
    tile, part = swizzle(tl.program_id(0), tiles, slices, GROUP)
    column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    offs_v = first_column + column
    offs_d = part * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    sums = tl.zeros((BLOCK_V, BLOCK_D), tl.float32)
    for start in range(0, count, BLOCK_N):
        local = start + tl.arange(0, BLOCK_N)
        mask_n = local < count
        row = tl.load(call.order_ptr + local, mask=mask_n, other=0)
        dy = tl.load(
            dy_ptr + local.to(tl.int64)[None, :] * stride_dy + column[:, None],
            mask=mask_n[None, :],
            other=0.0,
        )
        h = tl.load(
            x.hidden_ptr + row[:, None] * x.stride_hn + offs_d[None, :],
            mask=mask_n[:, None] & mask_d[None, :],
            other=0.0,
        )
        sums = dot(dy, h, sums, OPERAND, PRECISION)
    if scale_ptr is not None:
        sums /= tl.load(scale_ptr)
    place = grad_weight_ptr + offs_v.to(tl.int64)[:, None] * stride_gv + offs_d[None, :]
    mask = (column < columns)[:, None] & mask_d[None, :]
    if ADDS:
        sums += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, sums, mask=mask)


def recompute(
    inputs: Inputs, known: KnownRows, seed: Tensor | None, into: Gradients, *, adds: bool
) -> None:
    """See :meth:`bft_kernels.backends.common.on_device.Kernels.recompute`."""
    count, vocabulary, width = inputs.shape
    tile = tile_for(inputs.call, inputs.hidden, inputs.weight)
    for_hidden, for_weight = product_tiles(inputs.call.operand, inputs.hidden, inputs.weight)
    unit = max(tile.block_v, for_hidden.block_v, for_weight.block_v)  # powers of two
    work = Recomputation.of(inputs, known, into, unit)
    known, scale, row_blocks = work.known, work.scale, triton.cdiv(count, tile.block_n)
    bias_sums = None
    if into.bias is not None:
        size = row_blocks, work.step
        bias_sums = torch.zeros(size, dtype=torch.float32, device=work.dy.device)
    for first, columns in work.blocks():
        block = {"dy_ptr": work.dy, "stride_dy": work.step}
        block |= {"first_column": first, "columns": columns}
        if columns % unit:  # products take whole tiles
            whole = triton.cdiv(columns, unit) * unit
            work.dy.view(count, work.step)[:, columns:whole].zero_()
        _logit_gradient_kernel[(row_blocks * triton.cdiv(columns, tile.block_v),)](
            seed_ptr=seed,
            lse_ptr=known.lse,
            lse_low_ptr=known.lse_low if known.lse_low.numel() else None,
            nll_ptr=known.nll,
            grad_ptr=known.grad,
            bias_sums_ptr=bias_sums,
            rows=count,
            **block,
            **tile_arguments(inputs, tile),
        )
        if into.bias is not None and bias_sums is not None:
            total = bias_sums[:, :columns].sum(0)
            into.bias[first : first + columns] += total if scale is None else total / scale
        if into.hidden is not None:
            slices = triton.cdiv(width, for_hidden.block_d)
            _hidden_gradient_kernel[(triton.cdiv(count, for_hidden.block_n) * slices,)](
                sums_ptr=work.sums,
                grad_hidden_ptr=into.hidden,
                scale_ptr=scale,
                LAST=first + columns >= vocabulary,
                **block,
                **tile_arguments(inputs, for_hidden),
            )
        if into.weight is not None:
            slices = triton.cdiv(width, for_weight.block_d)
            _weight_gradient_kernel[(triton.cdiv(columns, for_weight.block_v) * slices,)](
                grad_weight_ptr=into.weight,
                scale_ptr=scale,
                stride_gv=into.weight.stride(0),
                ADDS=adds,
                **block,
                **tile_arguments(inputs, for_weight),
            )
