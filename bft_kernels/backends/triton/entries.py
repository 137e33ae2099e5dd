"""The lists of the sampled gradient: from bits to columns.

The forward leaves one bit for each entry that may be kept. Here its set bits become lists of
columns, row by row, in room whose size the host knows; nothing depends on the order in which
programs run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bft_kernels.backends.triton.device import popcount
from bft_kernels.backends.triton.inputs import Inputs


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


def capacity_for(rows: int, vocabulary: int, eps: float) -> int:
    """Entries that lists of ``rows`` rows have room for.

    Text keeps 70, 190 and 480 entries a token for ``eps`` of 2^-8, 2^-10 and 2^-12, and the bound
    of lse lets through twice as many: there is room for three times as many. Flat distributions
    keep ``1 / eps``. Rows that find no room are computed again, tile by tile.
    """
    return rows * int(min(vocabulary, max(64, 8 * eps**-0.6) + 1))


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
