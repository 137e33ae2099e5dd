"""The error certificate of the sampled gradient, in a pass of its own when lse is known."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bft_kernels.backends.common.gemm import squared_norms
from bft_kernels.backends.common.inputs import Inputs
from bft_kernels.backends.triton.device import logit_tile, normal_exp, slope_of, swizzle
from bft_kernels.backends.triton.inputs import splits_of, tile_arguments


@triton.jit(do_not_specialize=["rows", "splits", "tiles"])
def _certificate_kernel(
    x,
    call,
    lse_ptr,  # [N]
    norms_ptr,  # [V], |W_v|^2, or None
    sums_ptr,  # [2, SPLITS, N], by labelled row
    rows,  # N
    splits,
    tiles,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``sum_{v != target} p (eps - p)^+ slope^2`` over a split, and with ``|W_v|^2`` if asked."""
    block, split = swizzle(tl.program_id(0), tl.cdiv(rows, BLOCK_N), splits, GROUP)
    count, V = tl.load(call.count_ptr), call.V
    if block * BLOCK_N >= count:
        return
    local = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = local < count
    row = tl.load(call.order_ptr + local, mask=mask_n, other=0)
    target = tl.load(call.target_ptr + row, mask=mask_n, other=0)
    # 32 bits take half the instructions to compare.
    target = tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)
    lse = tl.load(lse_ptr + row, mask=mask_n, other=0.0)
    plain = tl.zeros((BLOCK_N,), tl.float32)
    normed = tl.zeros((BLOCK_N,), tl.float32)
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(V, BLOCK_V))):
        offs_v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        mask_v = offs_v < V
        z = logit_tile(x, call, row, offs_v, D, BLOCK_D, OPERAND, PRECISION)
        p = normal_exp(z - lse[:, None])
        slope = slope_of(z, call)
        term = p * tl.maximum(call.eps - p, 0.0) * slope * slope
        other = (offs_v[None, :] != target[:, None]) & mask_v[None, :]
        term = tl.where(other, term, 0.0)
        plain += tl.sum(term, axis=1)
        if norms_ptr is not None:
            norms = tl.load(norms_ptr + offs_v, mask=mask_v, other=0.0)
            normed += tl.sum(term * norms[None, :], axis=1)
    place = sums_ptr + split * rows + local
    tl.store(place, plain, mask=mask_n)
    if norms_ptr is not None:
        tl.store(place + splits * rows, normed, mask=mask_n)


def certify(inputs: Inputs, results: dict[str, Tensor]) -> None:
    """``variance [N]`` and, if it is wanted, ``hidden_variance [N]``, from lse."""
    call, count, lse = inputs.call, inputs.shape[0], results["lse"]
    norms = None
    if call.hidden_variance:
        norms = squared_norms(inputs.weight, torch.float32, call.buffer_bytes)
    splits = splits_of(inputs, count)
    sums = torch.zeros(
        1 if norms is None else 2, splits.count, count, dtype=torch.float32, device=lse.device
    )
    _certificate_kernel[(splits.row_blocks * splits.count,)](
        lse_ptr=lse,
        norms_ptr=norms,
        sums_ptr=sums,
        rows=count,
        splits=splits.count,
        tiles=splits.tiles,
        **tile_arguments(inputs, splits.tile),
    )
    for name, part in zip(("variance", "hidden_variance"), sums.sum(dim=1), strict=False):
        results[name] = inputs.rows.spread(part)
