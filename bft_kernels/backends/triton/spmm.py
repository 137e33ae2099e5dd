"""The sampled gradient from its lists: ``dH`` row by row, ``dW`` column by column.

The backward fetches the row of ``weight`` of each listed column once. If the list has no values, it
computes the logit again, and the final lse decides whether the entry is kept. It adds the row to
``dH`` while it is in registers. Kept entries are sorted by column for ``dW``. Rows are fetched
before they are summed, and each thread keeps its own sums up to the last row. The order in which
programs run changes nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bft_kernels.backends.common.gemm import as_operand, multiply, scale_for
from bft_kernels.backends.common.inputs import Inputs
from bft_kernels.backends.common.rows import KnownRows
from bft_kernels.backends.triton.configs import interpreted, target, triton_dtype
from bft_kernels.backends.triton.device import entry_dz, row_key
from bft_kernels.backends.triton.inputs import arguments_of
from bft_kernels.results import Gradients, Saved


@triton.jit(do_not_specialize=["capacity"])
def _spmm_hidden_kernel(
    x,
    call,
    seed_ptr,  # []
    lse_ptr,  # [N]
    nll_ptr,  # [N]
    grad_ptr,  # [N], upstream
    offsets_ptr,  # [N + 1]
    columns_ptr,  # [capacity]
    unit_ptr,  # [capacity] float32, dy for unit upstream gradient, or None
    keys_ptr,  # [capacity] int32, the column; not written where thinned out; or None
    rows_ptr,  # [capacity] int32; likewise
    values_ptr,  # [capacity] float32, upstream * dy; likewise
    grad_hidden_ptr,  # [N, D], or None
    capacity,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,  # not below D
    OPERAND: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program takes a row: it thins the list by the final lse, and sums the row of ``dH``."""
    if tl.program_id(0) >= tl.load(call.count_ptr):
        return
    row = tl.load(call.order_ptr + tl.program_id(0))
    begin = tl.load(offsets_ptr + row)
    end = tl.load(offsets_ptr + row + 1)
    if end > capacity:
        return
    upstream = tl.load(grad_ptr + row)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    if unit_ptr is None:
        target = tl.load(call.target_ptr + row)
        lse = tl.load(lse_ptr + row)
        nll = tl.load(nll_ptr + row)
        key = row_key(tl.load(seed_ptr), row)
        h = tl.load(x.hidden_ptr + row * x.stride_hn + offs_d, mask=mask_d, other=0.0)
        h = h.to(OPERAND).to(tl.float32)
    sums = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask_k = offs_k < end
        column = tl.load(columns_ptr + offs_k, mask=mask_k, other=0)
        w = tl.load(
            x.weight_ptr + column.to(tl.int64)[:, None] * x.stride_wv + offs_d[None, :],
            mask=mask_k[:, None] & mask_d[None, :],
            other=0.0,
        )
        w = w.to(OPERAND).to(tl.float32)
        if unit_ptr is not None:
            unit = tl.load(unit_ptr + offs_k, mask=mask_k, other=0.0)
            factor = upstream
        else:
            y = tl.sum(w * h[None, :], axis=1)
            unit, slope = entry_dz(y, column, mask_k, target, lse, nll, key, call)
            factor = slope * upstream
        # An infinite upstream would make NaN of what is not kept.
        value = tl.where(unit != 0, unit * factor, 0.0)
        kept = value != 0
        if keys_ptr is not None:
            tl.store(keys_ptr + offs_k, column, mask=kept)
            tl.store(rows_ptr + offs_k, row.to(tl.int32), mask=kept)
            tl.store(values_ptr + offs_k, value, mask=kept)
        if grad_hidden_ptr is not None:
            sums += tl.where(kept[:, None], w * value[:, None], 0.0)
    if grad_hidden_ptr is not None:
        tl.store(grad_hidden_ptr + row * D + offs_d, tl.sum(sums, axis=0), mask=mask_d)


@triton.jit(do_not_specialize=["few", "adds"])
def _spmm_weight_kernel(
    hidden_ptr,  # [N, D]
    starts_ptr,  # [V + 1] int64, first entry of each column among the sorted
    rows_ptr,  # [E] int32, sorted by column
    values_ptr,  # [E] float32, sorted likewise
    ranks_ptr,  # [V + 1] int32, below `few` for columns that a dense product takes
    grad_weight_ptr,  # [V, D], or None
    grad_bias_ptr,  # [V] float32, or None
    stride_hn,
    stride_gv,
    few,
    adds,  # 0 or 1
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program takes a column: it sums a row of ``dW`` and an element of ``db`` in row order.

    With ``adds`` the row is added to; otherwise it is written, even if it has no entries.
    """
    column = tl.program_id(0).to(tl.int64)
    begin = tl.load(starts_ptr + column)
    end = tl.load(starts_ptr + column + 1)
    if (begin == end) & ((adds != 0) | (grad_weight_ptr is None)):
        return
    if grad_bias_ptr is not None and tl.program_id(1) == 0:
        total = tl.zeros((BLOCK_K,), tl.float32)
        for start in range(begin, end, BLOCK_K):
            offs_k = start + tl.arange(0, BLOCK_K)
            total += tl.load(values_ptr + offs_k, mask=offs_k < end, other=0.0)
        before = tl.load(grad_bias_ptr + column)
        tl.store(grad_bias_ptr + column, before + tl.sum(total, axis=0))
    if grad_weight_ptr is not None:
        if tl.load(ranks_ptr + column) < few:
            return
        offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        sums = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
        for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
            offs_k = start + tl.arange(0, BLOCK_K)
            mask_k = offs_k < end
            value = tl.load(values_ptr + offs_k, mask=mask_k, other=0.0)
            row = tl.load(rows_ptr + offs_k, mask=mask_k, other=0)
            h = tl.load(
                hidden_ptr + row.to(tl.int64)[:, None] * stride_hn + offs_d[None, :],
                mask=(mask_k & (value != 0))[:, None] & mask_d[None, :],
                other=0.0,
            )
            sums += h.to(OPERAND).to(tl.float32) * value[:, None]
        total_d = tl.sum(sums, axis=0)
        place = grad_weight_ptr + column * stride_gv + offs_d
        total_d += tl.load(place, mask=mask_d & (adds != 0), other=0.0).to(tl.float32)
        tl.store(place, total_d, mask=mask_d)


class Listed(NamedTuple):
    """The lists after thinning; ``[capacity]`` each, in the order of the lists."""

    keys: Tensor  # int32, the column; V where there is no entry
    rows: Tensor  # int32; undefined where there is no entry
    values: Tensor  # float32, upstream * dy; likewise


def spmm(inputs: Inputs, known: KnownRows, saved: Saved, into: Gradients, *, adds: bool) -> None:
    """``dH = S @ W`` and ``dW = S.T @ H`` of the listed entries, and the sums ``db``.

    With ``adds``, ``dW`` is added to; otherwise it is written. ``db`` is added to.
    """
    wants_entries = into.weight is not None or into.bias is not None
    listed = _spmm_hidden(inputs, known, saved, into.hidden, wants_entries)
    # As many entries at a time as the budget sorts: a multiple of 16, so that parts are aligned.
    step = max(1, inputs.call.buffer_bytes // (16 * _SORTING_BYTES)) * 16
    for first in range(0, listed.keys.numel(), step):
        part = Listed(*(values[first : first + step] for values in listed))
        _spmm_weight(inputs, part, into, adds or first > 0)


def _spmm_hidden(
    inputs: Inputs,
    known: KnownRows,
    saved: Saved,
    grad_hidden: Tensor | None,
    wants_entries: bool,
) -> Listed:
    """``dH`` of the listed entries, and with ``wants_entries`` the entries.

    A list without values may hold more than the sample, and is thinned.
    """
    columns, values = saved.csr_columns, saved.csr_values
    count, vocabulary, width = inputs.shape
    places = columns.numel() if wants_entries else 0
    listed = Listed(
        torch.full((places,), vocabulary, dtype=torch.int32, device=columns.device),
        torch.empty(places, dtype=torch.int32, device=columns.device),
        torch.empty(places, dtype=torch.float32, device=columns.device),
    )
    block_d = triton.next_power_of_2(width)
    _spmm_hidden_kernel[(count,)](
        seed_ptr=inputs.call.seed,
        lse_ptr=known.lse,
        nll_ptr=known.nll,
        grad_ptr=known.grad,
        offsets_ptr=saved.csr_offsets,
        columns_ptr=columns,
        unit_ptr=values if values.numel() else None,
        **{f"{name}_ptr": x if wants_entries else None for name, x in listed._asdict().items()},
        grad_hidden_ptr=grad_hidden,
        capacity=columns.numel(),
        **_tile(block_d, inputs.weight, warps=8 if block_d >= 2048 else 4),
        **arguments_of(inputs),
    )
    return listed


# The bytes that a warp fetches at a time: more would spill its sums, less would leave it waiting.
# And the bytes of shared memory for all tiles that are being loaded; the smallest devices give a
# program 99 KiB.
_WARP_BYTES = 4096
_TILES_BYTES = 96 * 1024


def _tile(block_d: int, source: Tensor, warps: int = 4) -> dict[str, int]:
    """How many rows of ``source`` a program takes at a time, 16 at most, and launch options."""
    if interpreted():
        return {"BLOCK_K": 16, "BLOCK_D": block_d, "STAGES": 1, "num_warps": 1}
    row_bytes = block_d * source.itemsize
    rows = max(1, min(16, warps * _WARP_BYTES // row_bytes))
    stages = max(1, min(3, _TILES_BYTES // (rows * row_bytes)))
    if target()[0] == "hip":  # has no asynchronous copies to shared memory
        stages = 1
    return {"BLOCK_K": rows, "BLOCK_D": block_d, "STAGES": stages, "num_warps": warps}


# This many columns, those with the most entries, take a dense product: a program that gathered
# thousands of rows one after the other would be the last to end.
DENSE_COLUMNS = 256


# The bytes that sorting takes for an entry: keys, places and both once more for the sort's own use,
# and rows and values in order.
_SORTING_BYTES = 40


def _spmm_weight(inputs: Inputs, listed: Listed, into: Gradients, adds: bool) -> None:
    _, vocabulary, width = inputs.shape
    device = listed.keys.device
    keys, order = torch.sort(listed.keys, stable=True)  # by column, then by row
    bounds = torch.arange(vocabulary + 1, dtype=torch.int32, device=device)
    starts = torch.searchsorted(keys, bounds)
    del keys, bounds
    rows, values = listed.rows[order], listed.values[order]
    del order
    few, ranks = min(DENSE_COLUMNS, vocabulary // 8), None
    if into.weight is not None:
        dense = starts.diff().topk(few).indices
        ranks = torch.full((vocabulary + 1,), few, dtype=torch.int32, device=device)
        ranks[dense] = torch.arange(few, dtype=torch.int32, device=device)
        _dense_weight(inputs, dense, ranks, listed, into.weight, adds)
    # Most columns have few entries. So programs have few warps, and many wait at the same time.
    block_d = min(2048, triton.next_power_of_2(width))
    slices = triton.cdiv(width, block_d) if into.weight is not None else 1
    _spmm_weight_kernel[(vocabulary, slices)](
        hidden_ptr=inputs.hidden,
        starts_ptr=starts,
        rows_ptr=rows,
        values_ptr=values,
        ranks_ptr=ranks,
        grad_weight_ptr=into.weight,
        grad_bias_ptr=into.bias,
        stride_hn=inputs.hidden.stride(0),
        stride_gv=0 if into.weight is None else into.weight.stride(0),
        few=few,
        D=width,
        OPERAND=triton_dtype(inputs.call.operand),
        adds=int(adds),
        **_tile(block_d, inputs.hidden),
    )


@triton.jit(do_not_specialize=["places", "count", "few"])
def _fill_table_kernel(
    keys_ptr,  # [E]
    rows_ptr,  # [E]
    values_ptr,  # [E]
    ranks_ptr,  # [V + 1] int32, of the table's columns; at least `few` for others
    table_ptr,  # [few, N]
    places,  # E
    count,  # N
    few,
    BLOCK: tl.constexpr,
):
    """Copies the entries of a few columns to a table."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < places
    key = tl.load(keys_ptr + place, mask=mask, other=0)
    rank = tl.load(ranks_ptr + key)
    mask = mask & (rank < few)
    row = tl.load(rows_ptr + place, mask=mask, other=0)
    value = tl.load(values_ptr + place, mask=mask, other=0.0)
    tl.store(table_ptr + rank.to(tl.int64) * count + row, value, mask=mask)


def _dense_weight(
    inputs: Inputs, dense: Tensor, ranks: Tensor, listed: Listed, grad_weight: Tensor, adds: bool
) -> None:
    """``dW[dense] = P @ H``, or ``+=``: ``P [K, N]`` holds the entries of columns ``dense [K]``.

    ``ranks [V + 1]`` are the places of columns in ``dense``, or K.
    """
    count = inputs.shape[0]
    few, places = dense.numel(), listed.keys.numel()
    if few == 0:
        return
    rest = torch.zeros(few, count, dtype=torch.float32, device=dense.device)
    _fill_table_kernel[(triton.cdiv(places, 1024),)](
        *listed, ranks, rest, places, count, few, BLOCK=1024
    )
    hidden = as_operand(inputs.hidden, inputs.call.operand, torch.float32)
    hidden = inputs.rows.mask(hidden)
    if hidden.dtype == torch.float32:
        total = multiply(rest, hidden, torch.float32)
    else:  # a narrow type holds the values in two parts, to twice its precision
        scale = None
        if hidden.dtype == torch.float16:
            scale = scale_for(rest.view(-1), rest, 1.0, 0.0)
            rest.mul_(scale)
        part = rest.to(hidden.dtype)
        total = multiply(part, hidden, torch.float32)
        part = rest.sub_(part).to(hidden.dtype)
        total.add_(multiply(part, hidden, torch.float32))
        if scale is not None:
            total.div_(scale)
    if adds:
        total += grad_weight[dense].float()
    grad_weight[dense] = total.to(grad_weight.dtype)
