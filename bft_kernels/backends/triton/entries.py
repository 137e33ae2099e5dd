"""The sampled gradient: from bits to columns, from columns to ``dH`` and ``dW``.

The forward leaves one bit for each entry that may be kept. Here its set bits become lists of
columns, row by row. The backward looks at each listed column once: it fetches that row of
``weight``, forms the logit again, decides by the final lse and adds to ``dH`` while the row is in
registers. Nothing depends on the order in which programs run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bft_kernels.backends.torch.matmul import as_operand, multiply, scale_for
from bft_kernels.backends.triton.configs import interpreted
from bft_kernels.backends.triton.device import (
    draw_bits,
    expm1_down,
    popcount,
    row_key,
    sampled_dz,
    slope_of,
    transform,
)
from bft_kernels.backends.triton.inputs import Inputs
from bft_kernels.backends.triton.recompute import RowValues
from bft_kernels.results import Gradients


@triton.jit
def _load_words(mask_ptr, at, offs, words, V, target):
    """Words of a row's bits, the target's set: it is kept whatever its draw says.

    Bits past the vocabulary may be set, where the draw of a column that is not there is 0.
    """
    word = tl.load(mask_ptr + at + offs, mask=offs < words, other=0).to(tl.uint32, bitcast=True)
    spare = tl.maximum(tl.minimum((offs + 1) * 32 - V, 31), 0)
    word &= tl.full([], 0xFFFFFFFF, tl.uint32) >> spare.to(tl.uint32)
    valid = (target >= 0) & (target < V)  # of one nobody checked, the loss is NaN
    place = tl.where(valid, target, 0)
    bit = tl.full([], 1, tl.uint32) << (place % 32).to(tl.uint32)
    return tl.where(valid & (offs == place // 32), word | bit, word)


@triton.jit(do_not_specialize=["first_row"])
def _count_entries_kernel(
    mask_ptr,  # [R, WORDS]
    target_ptr,  # [N]
    order_ptr,  # [N]
    count_ptr,  # [1]
    counts_ptr,  # [N] int64
    first_row,
    words,
    V,
    BLOCK: tl.constexpr,
):
    """How many bits of each row are set."""
    local = tl.program_id(0).to(tl.int64)
    if first_row + local >= tl.load(count_ptr):
        return
    row = tl.load(order_ptr + first_row + local)
    target = tl.load(target_ptr + row)
    found = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, words, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        found += popcount(_load_words(mask_ptr, local * words, offs, words, V, target))
    tl.store(counts_ptr + row, tl.sum(found, axis=0).to(tl.int64))


@triton.jit(do_not_specialize=["first_row", "capacity"])
def _list_entries_kernel(
    mask_ptr,  # [R, WORDS]
    target_ptr,  # [N]
    order_ptr,  # [N]
    count_ptr,  # [1]
    offsets_ptr,  # [N + 1] int64
    columns_ptr,  # [capacity] int32
    first_row,
    words,
    V,
    capacity,
    BLOCK: tl.constexpr,
):
    """Columns of the set bits, ascending; of a row that does not fit, none."""
    local = tl.program_id(0).to(tl.int64)
    if first_row + local >= tl.load(count_ptr):
        return
    row = tl.load(order_ptr + first_row + local)
    target = tl.load(target_ptr + row)
    place = tl.load(offsets_ptr + row)
    if tl.load(offsets_ptr + row + 1) > capacity:
        return
    for start in range(0, words, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        word = _load_words(mask_ptr, local * words, offs, words, V, target)
        found = popcount(word)
        begin = place + tl.cumsum(found, axis=0) - found
        for bit in range(32):
            one = tl.full([], 1, tl.uint32) << bit
            below = popcount(word & (one - 1))
            column = offs * 32 + bit
            tl.store(columns_ptr + begin + below, column, mask=(word & one) != 0)
        place += tl.sum(found, axis=0)


@triton.jit(do_not_specialize=["capacity"])
def _gather_hidden_kernel(
    hidden_ptr,  # [N, D]
    weight_ptr,  # [V, D]
    bias_ptr,  # [V]
    target_ptr,  # [N]
    order_ptr,  # [N]
    count_ptr,  # [1]
    seed_ptr,  # []
    lse_ptr,  # [N]
    nll_ptr,  # [N]
    grad_ptr,  # [N], upstream
    offsets_ptr,  # [N + 1]
    columns_ptr,  # [capacity]
    values_ptr,  # [capacity] float32, upstream * dy; 0 where thinned out
    grad_hidden_ptr,  # [N, D]
    stride_hn,
    stride_wv,
    capacity,
    inverse_temperature,
    softcap,
    eps,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,  # not below D
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    OPERAND: tl.constexpr,
    WANTS_HIDDEN: tl.constexpr,
):
    """A program takes a row: thins its list by the final lse, and adds up its row of ``dH``."""
    if tl.program_id(0) >= tl.load(count_ptr):
        return
    row = tl.load(order_ptr + tl.program_id(0))
    begin = tl.load(offsets_ptr + row)
    end = tl.load(offsets_ptr + row + 1)
    if end > capacity:
        return
    target = tl.load(target_ptr + row)
    lse = tl.load(lse_ptr + row)
    nll = tl.load(nll_ptr + row)
    upstream = tl.load(grad_ptr + row)
    multiplier, offset = row_key(tl.load(seed_ptr), row)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    h = tl.load(hidden_ptr + row * stride_hn + offs_d, mask=mask_d, other=0.0)
    h = h.to(OPERAND).to(tl.float32)
    sums = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(begin, end, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask_k = offs_k < end
        column = tl.load(columns_ptr + offs_k, mask=mask_k, other=0)
        w = tl.load(
            weight_ptr + column.to(tl.int64)[:, None] * stride_wv + offs_d[None, :],
            mask=mask_k[:, None] & mask_d[None, :],
            other=0.0,
        )
        w = w.to(OPERAND).to(tl.float32)
        bias = 0.0
        if HAS_BIAS:
            bias = tl.load(bias_ptr + column, mask=mask_k, other=0.0).to(tl.float32)
        y = tl.sum(w * h[None, :], axis=1)
        z = transform(y, bias, inverse_temperature, softcap, HAS_BIAS, HAS_CAP)
        p = tl.exp(z - lse)
        bits = draw_bits(multiplier, offset, column.to(tl.uint32))
        value = sampled_dz(p, bits, column == target, expm1_down(-nll), eps)
        value *= slope_of(z, inverse_temperature, softcap, HAS_CAP) * upstream
        value = tl.where(mask_k, value, 0.0)
        tl.store(values_ptr + offs_k, value, mask=mask_k)
        if WANTS_HIDDEN:
            sums += tl.sum(tl.where((value != 0)[:, None], w * value[:, None], 0.0), axis=0)
    if WANTS_HIDDEN:
        tl.store(grad_hidden_ptr + row * D + offs_d, sums, mask=mask_d)


@triton.jit
def _gather_weight_kernel(
    hidden_ptr,  # [N, D]
    starts_ptr,  # [V + 1] int64, first entry of each column among the sorted
    rows_ptr,  # [E] int64, sorted by column
    values_ptr,  # [E] float32, sorted likewise
    skip_ptr,  # [V] bool, columns that a dense product takes
    grad_weight_ptr,  # [V, D]
    grad_bias_ptr,  # [V] float32
    stride_hn,
    stride_gv,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    WANTS_WEIGHT: tl.constexpr,
    WANTS_BIAS: tl.constexpr,
):
    """A program takes a column: adds up, in the order of rows, its row of ``dW``, and ``db``."""
    column = tl.program_id(0).to(tl.int64)
    begin = tl.load(starts_ptr + column)
    end = tl.load(starts_ptr + column + 1)
    if begin == end:
        return
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    total = tl.zeros((BLOCK_K,), tl.float32)
    sums = tl.zeros((BLOCK_D,), tl.float32)
    dense = tl.load(skip_ptr + column)
    for start in range(begin, end, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask_k = offs_k < end
        value = tl.load(values_ptr + offs_k, mask=mask_k, other=0.0)
        total += value
        if WANTS_WEIGHT and dense == 0:
            row = tl.load(rows_ptr + offs_k, mask=mask_k, other=0)
            h = tl.load(
                hidden_ptr + row.to(tl.int64)[:, None] * stride_hn + offs_d[None, :],
                mask=(mask_k & (value != 0))[:, None] & mask_d[None, :],
                other=0.0,
            )
            sums += tl.sum(h.to(OPERAND).to(tl.float32) * value[:, None], axis=0)
    if WANTS_BIAS and tl.program_id(1) == 0:
        before = tl.load(grad_bias_ptr + column)
        tl.store(grad_bias_ptr + column, before + tl.sum(total, axis=0))
    if WANTS_WEIGHT and dense == 0:
        place = grad_weight_ptr + column * stride_gv + offs_d
        sums += tl.load(place, mask=mask_d, other=0.0).to(tl.float32)
        tl.store(place, sums, mask=mask_d)


def capacity_for(rows: int, vocabulary: int, eps: float) -> int:
    """Entries that lists of ``rows`` rows have room for: a quarter of the most that is expected.

    ``1 / eps`` a token are expected of flat distributions; of text, an eighth and less. Rows that
    find no room are computed again, tile by tile.
    """
    return rows * int(min(vocabulary, max(64, 0.25 / eps) + 1))


def list_entries(
    inputs: Inputs, mask: Tensor, first_row: int, counts: Tensor, columns: Tensor
) -> None:
    """Appends the columns of the bits of ``mask [R, WORDS]`` to ``columns``, and to ``counts``."""
    rows, words = mask.shape
    block = min(1024, triton.next_power_of_2(words))
    where = {
        "mask_ptr": mask,
        "target_ptr": inputs.target,
        "order_ptr": inputs.rows.order,
        "count_ptr": inputs.rows.count,
        "first_row": first_row,
        "words": words,
        "V": inputs.shape[1],
        "BLOCK": block,
    }
    _count_entries_kernel[(rows,)](counts_ptr=counts, **where)
    offsets = offsets_of(counts)
    _list_entries_kernel[(rows,)](
        offsets_ptr=offsets, columns_ptr=columns, capacity=columns.numel(), **where
    )


def offsets_of(counts: Tensor) -> Tensor:
    """``[N + 1]``: where the entries of each row begin. Rows that end past the room have none."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def overflowed(offsets: Tensor, capacity: int) -> Tensor:
    """``[N]`` bool: rows whose entries found no room."""
    return (offsets[1:] > capacity) & (offsets.diff() > 0)


def gather_hidden(
    inputs: Inputs,
    known: RowValues,
    seed: Tensor,
    offsets: Tensor,
    columns: Tensor,
    grad_hidden: Tensor | None,
) -> Tensor:
    """Values ``[capacity]`` of the listed entries, upstream included, and ``dH``."""
    count, _, width = inputs.shape
    values = torch.zeros(columns.numel(), device=columns.device)
    block_d = triton.next_power_of_2(width)
    _gather_hidden_kernel[(count,)](
        seed_ptr=seed,
        lse_ptr=known.lse,
        nll_ptr=known.nll,
        grad_ptr=known.grad,
        offsets_ptr=offsets,
        columns_ptr=columns,
        values_ptr=values,
        grad_hidden_ptr=grad_hidden,
        capacity=columns.numel(),
        eps=inputs.config.eps,
        BLOCK_K=rows_at_a_time(block_d),
        BLOCK_D=block_d,
        WANTS_HIDDEN=grad_hidden is not None,
        num_warps=8 if block_d >= 2048 else 4,
        **inputs.arguments(),
    )
    return values


def rows_at_a_time(block_d: int) -> int:
    """How many gathered rows a program holds: 32768 elements in all, 16 rows at most."""
    return 16 if interpreted() else max(1, min(16, 32768 // block_d))


# Columns kept by more rows than others take a dense product: a program that gathered thousands of
# rows one after the other would be the last to end.
DENSE_COLUMNS = 256


def gather_weight(
    inputs: Inputs, values: Tensor, offsets: Tensor, columns: Tensor, into: Gradients
) -> None:
    """Adds ``dW`` and ``db`` of the listed entries to ``into``."""
    _, vocabulary, width = inputs.shape
    row, key = _rows_and_keys(values, offsets, columns, vocabulary)
    dense = None
    skip = torch.zeros(vocabulary, dtype=torch.bool, device=columns.device)
    key, order = torch.sort(key, stable=True)  # by column, then by row
    row, values = row[order], values[order]
    bounds = torch.arange(vocabulary + 1, dtype=torch.int32, device=columns.device)
    starts = torch.searchsorted(key, bounds)
    if into.weight is not None:
        few = min(DENSE_COLUMNS, vocabulary // 8)
        dense = starts.diff().topk(few).indices
        skip.index_fill_(0, dense, True)
    block_d = min(1024, triton.next_power_of_2(width))
    _gather_weight_kernel[(vocabulary, triton.cdiv(width, block_d))](
        hidden_ptr=inputs.hidden,
        starts_ptr=starts,
        rows_ptr=row,
        values_ptr=values,
        skip_ptr=skip,
        grad_weight_ptr=into.weight,
        grad_bias_ptr=into.bias,
        stride_hn=inputs.hidden.stride(0),
        stride_gv=0 if into.weight is None else into.weight.stride(0),
        D=width,
        BLOCK_K=rows_at_a_time(block_d),
        BLOCK_D=block_d,
        OPERAND=inputs.arguments()["OPERAND"],
        WANTS_WEIGHT=into.weight is not None,
        WANTS_BIAS=into.bias is not None,
        num_warps=4,
    )
    if dense is not None and into.weight is not None:
        _add_dense(inputs, dense, key, row, values, into.weight)


def _rows_and_keys(
    values: Tensor, offsets: Tensor, columns: Tensor, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """Row of each place of the list, and its column; ``V`` where there is no entry."""
    capacity = columns.numel()
    place = torch.arange(capacity, device=columns.device)
    row = torch.searchsorted(offsets, place, right=True, out_int32=True) - 1
    row.clamp_(max=offsets.numel() - 2)
    listed = (offsets[1:] <= capacity)[row] & (place < offsets[-1])
    key = torch.where(listed & (values != 0), columns, vocabulary)
    return row, key


def _add_dense(
    inputs: Inputs,
    dense: Tensor,  # [K] columns
    key: Tensor,  # [E] columns of the entries, V where there is none
    row: Tensor,  # [E]
    values: Tensor,  # [E]
    grad_weight: Tensor,  # [V, D]
) -> None:
    """``dW[dense] += P @ H`` with ``P [K, N]`` the entries of these columns."""
    count, vocabulary, _ = inputs.shape
    few = dense.numel()
    rank = torch.full((vocabulary + 1,), few, device=dense.device)
    rank[dense] = torch.arange(few, device=dense.device)
    # One row more, for all other entries: nobody reads it.
    table = torch.zeros(few + 1, count, device=dense.device)
    table.view(-1)[rank[key] * count + row] = values
    operand = inputs.config.operand_dtype
    hidden = as_operand(inputs.hidden, operand, torch.float32)
    hidden = torch.where(inputs.rows.labelled[:, None], hidden, hidden.new_zeros(()))
    rest = table[:few]
    if hidden.dtype == torch.float32:
        total = multiply(rest, hidden, torch.float32)
    else:  # a narrow type holds the values in two parts, to twice its precision
        scale = scale_for(values, values, 1.0, 0.0)
        rest = rest.mul_(scale)
        part = rest.to(hidden.dtype)
        total = multiply(part, hidden, torch.float32)
        rest = rest.sub_(part).to(hidden.dtype)
        total = total.add_(multiply(rest, hidden, torch.float32)).div_(scale)
    grad_weight[dense] = (grad_weight[dense].float() + total).to(grad_weight.dtype)
