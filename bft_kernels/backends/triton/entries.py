"""The lists of the sampled gradient: from bits to columns.

The forward leaves one bit for each entry that may be kept. Here the set bits become lists of
columns, row by row, in memory whose size the host knows. Nothing depends on the order in which
programs run.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bft_kernels.backends.common.csr import offsets_of
from bft_kernels.backends.common.inputs import Inputs
from bft_kernels.backends.common.logit_rows import LogitRows
from bft_kernels.backends.triton.device import entry_dz, lowest_bit, popcount, row_key
from bft_kernels.backends.triton.inputs import Call, call_of
from bft_kernels.backends.triton.softmax import call_of_rows


@triton.jit
def load_words(words_ptr, offs, words, V, target):
    """Words of a row's bits. The target's bit is set: it is kept whatever its draw says.

    Bits past the vocabulary may be set, because the draw of such a column may be 0. They are
    cleared here.
    """
    word = tl.load(words_ptr + offs, mask=offs < words, other=0).to(tl.uint32, bitcast=True)
    spare = tl.maximum(tl.minimum((offs + 1) * 32 - V, 31), 0)
    word &= tl.full([], 0xFFFFFFFF, tl.uint32) >> spare.to(tl.uint32)
    # An unchecked target may lie outside; its loss is NaN.
    valid = (target >= 0) & (target < V)
    place = tl.where(valid, target, 0)
    bit = tl.full([], 1, tl.uint32) << (place % 32).to(tl.uint32)
    return tl.where(valid & (offs == place // 32), word | bit, word)


@triton.jit(do_not_specialize=["first_row"])
def _count_entries_kernel(
    call,
    logits_ptr,  # [R, V], raw products, or None
    mask_ptr,  # [R, WORDS]
    seed_ptr,  # []; this and the next two with logits only
    lse_ptr,  # [N]
    nll_ptr,  # [N]
    counts_ptr,  # [N] int64
    first_row,
    words,
    BLOCK: tl.constexpr,
):
    """Counts the set bits of a row.

    If logits are given, bits that the final lse does not keep are cleared first.
    """
    local = tl.program_id(0).to(tl.int64)
    if first_row + local >= tl.load(call.count_ptr):
        return
    row = tl.load(call.order_ptr + first_row + local)
    target = tl.load(call.target_ptr + row)
    words_ptr = mask_ptr + local * words
    if logits_ptr is not None:
        lse, nll = tl.load(lse_ptr + row), tl.load(nll_ptr + row)
        key = row_key(tl.load(seed_ptr), row)
    found = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, words, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        kept = load_words(words_ptr, offs, words, call.V, target)
        if logits_ptr is not None:
            left = kept
            kept = tl.zeros((BLOCK,), tl.uint32)
            while tl.max((left != 0).to(tl.int32), axis=0) > 0:
                one, bit = lowest_bit(left)
                column = offs * 32 + bit
                mask = left != 0
                y = tl.load(logits_ptr + local * call.V + column, mask=mask, other=0.0)
                dz, _ = entry_dz(y, column, mask, target, lse, nll, key, call)
                kept = tl.where(dz != 0, kept | one, kept)
                left = left & (left - 1)
            tl.store(words_ptr + offs, kept.to(tl.int32, bitcast=True), offs < words)
        found += popcount(kept)
    tl.store(counts_ptr + row, tl.sum(found, axis=0).to(tl.int64))


@triton.jit(do_not_specialize=["first_row", "capacity"])
def _list_entries_kernel(
    call,
    logits_ptr,  # [R, V], raw products, or None
    mask_ptr,  # [R, WORDS]; with logits, of the kept entries
    seed_ptr,  # []; this, the next two and values with logits only
    lse_ptr,  # [N]
    nll_ptr,  # [N]
    offsets_ptr,  # [N + 1] int64
    columns_ptr,  # [capacity] int32
    values_ptr,  # [capacity] float32, dy for unit upstream gradient
    first_row,
    words,
    capacity,
    BLOCK: tl.constexpr,
):
    """Lists the columns of a row's set bits, ascending, unless the row finds no room."""
    local = tl.program_id(0).to(tl.int64)
    if first_row + local >= tl.load(call.count_ptr):
        return
    row = tl.load(call.order_ptr + first_row + local)
    target = tl.load(call.target_ptr + row)
    words_ptr = mask_ptr + local * words
    place = tl.load(offsets_ptr + row)
    if tl.load(offsets_ptr + row + 1) > capacity:
        return
    if logits_ptr is not None:
        lse, nll = tl.load(lse_ptr + row), tl.load(nll_ptr + row)
        key = row_key(tl.load(seed_ptr), row)
    for start in range(0, words, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        if logits_ptr is not None:
            left = tl.load(words_ptr + offs, mask=offs < words, other=0)
            left = left.to(tl.uint32, bitcast=True)
        else:
            left = load_words(words_ptr, offs, words, call.V, target)
        found = popcount(left)
        at = place + tl.cumsum(found, axis=0) - found
        place += tl.sum(found, axis=0)
        while tl.max((left != 0).to(tl.int32), axis=0) > 0:
            _, bit = lowest_bit(left)
            column = offs * 32 + bit
            mask = left != 0
            tl.store(columns_ptr + at, column, mask=mask)
            if logits_ptr is not None:
                y = tl.load(logits_ptr + local * call.V + column, mask=mask, other=0.0)
                dz, slope = entry_dz(y, column, mask, target, lse, nll, key, call)
                tl.store(values_ptr + at, dz * slope, mask=mask)
            at += 1
            left = left & (left - 1)


def list_candidates(
    inputs: Inputs, mask: Tensor, first_row: int, results: dict[str, Tensor]
) -> None:
    """Appends the columns of the bits of ``mask [R, WORDS]`` to ``columns``."""
    _append(call_of(inputs), mask, first_row, results)


def list_rows(rows: LogitRows, mask: Tensor, seed: Tensor, results: dict[str, Tensor]) -> None:
    """Appends the kept entries among the bits of ``mask [R, WORDS]`` to columns and values."""
    _append(call_of_rows(rows), mask, rows.first_row, results, rows.logits, seed)


def _append(
    call: Call,
    mask: Tensor,
    first_row: int,
    results: dict[str, Tensor],
    logits: Tensor | None = None,  # [R, V]
    seed: Tensor | None = None,  # []
) -> None:
    counts, columns, words = results["counts"], results["columns"], mask.shape[1]
    shared = {
        "call": call,
        "logits_ptr": logits,
        "mask_ptr": mask,
        "seed_ptr": seed,
        "lse_ptr": results["lse"],
        "nll_ptr": results["nll"],
        "first_row": first_row,
        "words": words,
        "BLOCK": min(1024, triton.next_power_of_2(words)),
    }
    _count_entries_kernel[(mask.shape[0],)](counts_ptr=counts, **shared)
    _list_entries_kernel[(mask.shape[0],)](
        offsets_ptr=offsets_of(counts, out=results["offsets"]),
        columns_ptr=columns,
        values_ptr=results["values"],
        capacity=columns.numel(),
        **shared,
    )
