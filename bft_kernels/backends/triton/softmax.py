"""Kernels over rows of logits that lie in a buffer. A program takes a row."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from bft_kernels.backends.common.logit_rows import LogitRows
from bft_kernels.backends.triton.configs import at_most_registers, loop_stages, triton_dtype
from bft_kernels.backends.triton.device import (
    ROUNDING,
    exact_factors,
    finite_or,
    logits_at,
    may_be_below,
    row_key,
    slope_of,
    store_results,
)
from bft_kernels.backends.triton.inputs import Call, RowResults


@triton.jit
def _lse_bound_of(logits, popular_ptr, target, call, POPULAR: tl.constexpr):
    """A lower bound of lse: the larger of the target's logit and the lse of a few columns."""
    place = tl.arange(0, POPULAR)
    column = tl.load(popular_ptr + place)
    repeated = column == tl.load(popular_ptr + place - 1, mask=place > 0, other=-1)
    z = logits_at(tl.load(logits + column), column, True, call)
    z = tl.where(repeated, float("-inf"), z)
    own, _ = _own_logit(logits, target, call)
    m = tl.max(z, axis=0)
    lse_bound = m + tl.log(tl.sum(tl.exp(z - finite_or(m, 0.0)), axis=0))
    # A logit that is not finite must affect only the rows and columns that have it.
    lse_bound = tl.where(tl.abs(lse_bound) < float("inf"), tl.maximum(lse_bound, own), own)
    return lse_bound - ROUNDING * tl.abs(lse_bound) - ROUNDING


@triton.jit
def _own_logit(logits, target, call):
    """The target's logit, and whether the target is a column: an unchecked one may not be."""
    column = tl.minimum(tl.maximum(target, 0), call.V - 1)
    return logits_at(tl.load(logits + column), column, True, call), column == target


@triton.jit(do_not_specialize=["first_row"])
def _softmax_rows_kernel(
    call,
    logits_ptr,  # [n, V], raw products
    seed_ptr,  # []; this and the next two for the sampled gradient only
    popular_ptr,  # [POPULAR] int64, ascending columns
    mask_ptr,  # [n, WORDS], a bit for each entry that may be kept
    out,  # RowResults
    first_row,
    words,
    BLOCK: tl.constexpr,  # a multiple of 32
    POPULAR: tl.constexpr,  # 0: there is no sample
    STAGES: tl.constexpr,
):
    """A program reads a row's logits once, for loss, statistics and entries that may be kept."""
    local = tl.program_id(0).to(tl.int64)
    row = first_row + local
    if call.order_ptr is not None:
        if row >= tl.load(call.count_ptr):
            return
        row = tl.load(call.order_ptr + row)
    target = tl.load(call.target_ptr + row)
    V = call.V
    logits = logits_ptr + local * V
    if POPULAR > 0:
        multiplier, offset = row_key(tl.load(seed_ptr), row)
        lse_bound = _lse_bound_of(logits, popular_ptr, target, call, POPULAR)
    offs = tl.arange(0, BLOCK)
    m = tl.full((BLOCK,), float("-inf"), tl.float32)
    before = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    moment = tl.zeros((BLOCK,), tl.float32)
    shifted = tl.zeros((BLOCK,), tl.float32)
    # Each lane keeps sums of its own, which are joined once, at the end. Two blocks are being
    # loaded while one is used.
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        column = start + offs
        mask = column < V
        y = tl.load(logits + column, mask=mask, other=0.0)
        z = logits_at(y, column, mask, call)
        z = tl.where(mask, z, float("-inf"))
        if POPULAR > 0:
            bound = tl.exp(tl.minimum(z - lse_bound, 80.0))
            place = multiplier * column.to(tl.uint32) + offset
            keep = may_be_below(place, bound, 65536.0 / call.eps)
            shifted_bits = keep.to(tl.int32) << (offs % 32)
            packed = tl.sum(tl.reshape(shifted_bits, (BLOCK // 32, 32)), axis=1)
            word = start // 32 + tl.arange(0, BLOCK // 32)
            tl.store(mask_ptr + local * words + word, packed, mask=word < words)
        m_new = tl.maximum(m, z)
        reference = finite_or(m_new, 0.0)
        scale, difference = tl.exp(m - reference), z - reference
        e = tl.exp(difference)
        if out.entropy_ptr is not None:
            step = tl.where(total > 0, total * (m - reference), 0.0)
            moment = scale * (moment + step) + e * tl.maximum(difference, -1e30)
            before = tl.where(column < target, tl.maximum(before, z), before)
        if call.label_smoothing is not None:
            # A lane has seen start / BLOCK columns so far.
            step = tl.where(start > 0, (m - reference) * (start // BLOCK), 0.0)
            shifted += step + tl.where(mask, difference, 0.0)
        total = scale * total + e
        m = m_new
    peak = tl.max(m, axis=0)
    reference = finite_or(peak, 0.0)
    lanes = finite_or(m, 0.0)
    scale = tl.exp(m - reference)
    moment_sum = 0.0
    if out.entropy_ptr is not None:
        step = tl.where(total > 0, total * (m - reference), 0.0)
        moment_sum = tl.sum(scale * (moment + step), axis=0)
    shifted_sum = 0.0
    if call.label_smoothing is not None:
        seen = tl.cdiv(tl.maximum(V - offs, 0), BLOCK)
        shifted_sum = tl.sum(shifted + tl.where(seen > 0, (lanes - reference) * seen, 0.0), axis=0)
    sum_all = tl.sum(scale * total, axis=0)
    own, valid = _own_logit(logits, target, call)
    own = tl.where(valid, own, float("nan"))
    first = (own == peak) & (tl.max(before, axis=0) < own)
    store_results(out, row, None, sum_all, reference, own, moment_sum, first, shifted_sum, call)


@triton.jit(do_not_specialize=["first_row"])
def _certificate_rows_kernel(
    call,
    logits_ptr,  # [n, V], raw products
    lse_ptr,  # [N]
    norms_ptr,  # [V], |W_v|^2, or None
    variance_ptr,  # [N]
    hidden_variance_ptr,  # [N], with norms
    first_row,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``sum_{v != target} p (eps - p)^+ slope^2`` of a row, and with ``|W_v|^2`` if asked."""
    local = tl.program_id(0).to(tl.int64)
    if first_row + local >= tl.load(call.count_ptr):
        return
    row = tl.load(call.order_ptr + first_row + local)
    target = tl.load(call.target_ptr + row)
    lse = tl.load(lse_ptr + row)
    plain = tl.zeros((BLOCK,), tl.float32)
    normed = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, call.V, BLOCK, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK)
        mask = column < call.V
        y = tl.load(logits_ptr + local * call.V + column, mask=mask, other=0.0)
        z = logits_at(y, column, mask, call)
        p = tl.exp(z - lse)
        slope = slope_of(z, call)
        term = p * tl.maximum(call.eps - p, 0.0) * slope * slope
        term = tl.where(mask & (column != target), term, 0.0)
        plain += term
        if norms_ptr is not None:
            normed += term * tl.load(norms_ptr + column, mask=mask, other=0.0)
    tl.store(variance_ptr + row, tl.sum(plain, axis=0))
    if norms_ptr is not None:
        tl.store(hidden_variance_ptr + row, tl.sum(normed, axis=0))


@triton.jit
def _gradient_rows_kernel(
    call,
    logits_ptr,  # [n, V] float32, raw products
    dy_ptr,  # [n, V], in the same memory; a row begins where its logits do
    lse_ptr,  # [n]
    lse_low_ptr,  # [n]
    nll_ptr,  # [n]
    coefficient_ptr,  # [n]
    stride_dn,
    BLOCK: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """``coefficient * dy`` of a row takes the place of its logits."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(call.target_ptr + row)
    lse = tl.load(lse_ptr + row)
    nll = tl.load(nll_ptr + row)
    coefficient = tl.load(coefficient_ptr + row)
    rest = tl.exp(-tl.load(lse_low_ptr + row))
    probability, even, own = exact_factors(lse, nll, call)
    for start in range(0, call.V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < call.V
        y = tl.load(logits_ptr + row * call.V + column, mask=mask, other=0.0)
        z = logits_at(y, column, mask, call)
        dz = tl.where(column == target, own, tl.exp(z - lse) * rest * probability - even)
        dy = dz * slope_of(z, call) * coefficient
        # Narrow values are written over logits of this block, or of one before it: all threads
        # must have read theirs.
        tl.debug_barrier()
        tl.store(dy_ptr + row * stride_dn + column, dy.to(OPERAND), mask=mask)


def call_of_rows(rows: LogitRows) -> Call:
    """The argument of kernels over logits in a buffer."""
    return Call.of(rows, rows.order, rows.count, rows.logits.shape[1])


def _row_arguments(rows: LogitRows) -> dict[str, Any]:
    """The arguments of kernels that pass over whole rows of logits."""
    block = max(32, min(2048, triton.next_power_of_2(rows.logits.shape[1])))
    call = call_of_rows(rows)
    return {"call": call, "logits_ptr": rows.logits, "BLOCK": block, "num_warps": 8}


def softmax_rows(
    rows: LogitRows,
    results: dict[str, Tensor],
    *,
    seed: Tensor | None = None,
    popular: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """Losses and statistics of the rows, and a bit for each entry that may be kept.

    For the arguments see :class:`bft_kernels.backends.common.logit_rows.RowFunctions`.
    """
    capped = rows.settings.softcap is not None and popular is not None
    _softmax_rows_kernel[(rows.logits.shape[0],)](
        seed_ptr=seed,
        popular_ptr=popular,
        mask_ptr=mask,
        first_row=rows.first_row,
        words=0 if mask is None else mask.shape[1],
        POPULAR=0 if popular is None else popular.numel(),
        STAGES=loop_stages(),
        **at_most_registers(96 if capped else None),  # at 80, its own choice, sm_100 spills 8 bytes
        out=RowResults.of(results),
        **_row_arguments(rows),
    )


def certificate_rows(rows: LogitRows, norms: Tensor | None, results: dict[str, Tensor]) -> None:
    """The certificate of the rows of a buffer, once their lse is known."""
    _certificate_rows_kernel[(rows.logits.shape[0],)](
        norms_ptr=norms,
        **{f"{name}_ptr": results[name] for name in ("lse", "variance", "hidden_variance")},
        first_row=rows.first_row,
        STAGES=loop_stages(),
        **_row_arguments(rows),
    )


def gradient_rows(
    rows: LogitRows,
    dy: Tensor,  # [n, V], in the memory of the logits
    lse: Tensor,  # [n]
    lse_low: Tensor,  # [n]
    nll: Tensor,  # [n]
    coefficient: Tensor,  # [n]
) -> None:
    """``coefficient * dy`` of the rows of a buffer takes the place of their logits."""
    _gradient_rows_kernel[(dy.shape[0],)](
        dy_ptr=dy,
        lse_ptr=lse,
        lse_low_ptr=lse_low,
        nll_ptr=nll,
        coefficient_ptr=coefficient,
        stride_dn=dy.stride(0),
        OPERAND=triton_dtype(dy.dtype),
        **_row_arguments(rows),
    )
