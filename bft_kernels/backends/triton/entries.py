"""The lists of the sampled gradient: from bits to columns.

The forward leaves one bit for each entry that may be kept. Here its set bits become lists of
columns, row by row, in room whose size the host knows; nothing depends on the order in which
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
from bft_kernels.backends.triton.softmax import logit_arguments


@triton.jit
def load_words(mask_ptr, at, offs, words, V, target):
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
        found += popcount(load_words(mask_ptr, local * words, offs, words, V, target))
    tl.store(counts_ptr + row, tl.sum(found, axis=0).to(tl.int64))


@triton.jit(do_not_specialize=["first_row"])
def _thin_entries_kernel(
    logits_ptr,  # [R, V], raw products
    bias_ptr,  # [V]
    mask_ptr,  # [R, WORDS]
    target_ptr,  # [N]
    order_ptr,  # [N]
    count_ptr,  # [1]
    seed_ptr,  # []
    lse_ptr,  # [N]
    nll_ptr,  # [N]
    counts_ptr,  # [N] int64
    first_row,
    words,
    V,
    inverse_temperature,
    softcap,
    eps,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    """Leaves the bits of what is kept, by the final lse, and counts them."""
    local = tl.program_id(0).to(tl.int64)
    if first_row + local >= tl.load(count_ptr):
        return
    row = tl.load(order_ptr + first_row + local)
    target = tl.load(target_ptr + row)
    lse = tl.load(lse_ptr + row)
    nll = tl.load(nll_ptr + row)
    multiplier, offset = row_key(tl.load(seed_ptr), row)
    found = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, words, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        left = load_words(mask_ptr, local * words, offs, words, V, target)
        kept = tl.zeros((BLOCK,), tl.uint32)
        while tl.max((left != 0).to(tl.int32), axis=0) > 0:
            one, bit = lowest_bit(left)
            column = offs * 32 + bit
            mask = left != 0
            dz, _ = entry_dz(
                tl.load(logits_ptr + local * V + column, mask=mask, other=0.0),
                bias_ptr,
                column,
                mask,
                target,
                lse,
                nll,
                multiplier,
                offset,
                inverse_temperature,
                softcap,
                eps,
                HAS_BIAS,
                HAS_CAP,
            )
            kept = tl.where(dz != 0, kept | one, kept)
            left = left & (left - 1)
        tl.store(mask_ptr + local * words + offs, kept.to(tl.int32, bitcast=True), offs < words)
        found += popcount(kept)
    tl.store(counts_ptr + row, tl.sum(found, axis=0).to(tl.int64))


@triton.jit(do_not_specialize=["first_row", "capacity"])
def _list_entries_kernel(
    logits_ptr,  # [R, V], raw products, with VALUES
    bias_ptr,  # [V]
    mask_ptr,  # [R, WORDS]
    target_ptr,  # [N]
    order_ptr,  # [N]
    count_ptr,  # [1]
    seed_ptr,  # []
    lse_ptr,  # [N]
    nll_ptr,  # [N]
    offsets_ptr,  # [N + 1] int64
    columns_ptr,  # [capacity] int32
    values_ptr,  # [capacity] float32, dy for unit upstream gradient, with VALUES
    first_row,
    words,
    V,
    capacity,
    inverse_temperature,
    softcap,
    eps,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    VALUES: tl.constexpr,
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
    if VALUES:
        lse = tl.load(lse_ptr + row)
        nll = tl.load(nll_ptr + row)
        multiplier, offset = row_key(tl.load(seed_ptr), row)
    for start in range(0, words, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        if VALUES:  # the bits are those of what is kept
            left = tl.load(mask_ptr + local * words + offs, mask=offs < words, other=0)
            left = left.to(tl.uint32, bitcast=True)
        else:
            left = load_words(mask_ptr, local * words, offs, words, V, target)
        found = popcount(left)
        at = place + tl.cumsum(found, axis=0) - found
        place += tl.sum(found, axis=0)
        while tl.max((left != 0).to(tl.int32), axis=0) > 0:
            _, bit = lowest_bit(left)
            column = offs * 32 + bit
            mask = left != 0
            tl.store(columns_ptr + at, column, mask=mask)
            if VALUES:
                dz, slope = entry_dz(
                    tl.load(logits_ptr + local * V + column, mask=mask, other=0.0),
                    bias_ptr,
                    column,
                    mask,
                    target,
                    lse,
                    nll,
                    multiplier,
                    offset,
                    inverse_temperature,
                    softcap,
                    eps,
                    HAS_BIAS,
                    HAS_CAP,
                )
                tl.store(values_ptr + at, dz * slope, mask=mask)
            at += 1
            left = left & (left - 1)


def list_candidates(
    inputs: Inputs, mask: Tensor, first_row: int, results: dict[str, Tensor]
) -> None:
    """Appends the columns of the bits of ``mask [R, WORDS]`` to ``columns``."""
    counts, columns = results["counts"], results["columns"]
    where = _where(mask, inputs.target, inputs.rows.order, inputs.rows.count, first_row)
    where |= {"V": inputs.shape[1]}
    _count_entries_kernel[(mask.shape[0],)](counts_ptr=counts, **where)
    _list_entries_kernel[(mask.shape[0],)](
        logits_ptr=None,
        bias_ptr=None,
        seed_ptr=None,
        lse_ptr=None,
        nll_ptr=None,
        offsets_ptr=offsets_of(counts, out=results["offsets"]),
        columns_ptr=columns,
        values_ptr=None,
        capacity=columns.numel(),
        inverse_temperature=1.0,
        softcap=1.0,
        eps=1.0,
        HAS_BIAS=False,
        HAS_CAP=False,
        VALUES=False,
        **where,
    )


def list_rows(rows: LogitRows, mask: Tensor, seed: Tensor, results: dict[str, Tensor]) -> None:
    """Appends what is kept of the set bits of ``mask [R, WORDS]`` to ``columns`` and ``values``."""
    counts, columns = results["counts"], results["columns"]
    shared = logit_arguments(rows) | _where(
        mask, rows.target, rows.order, rows.count, rows.first_row
    )
    shared |= {"seed_ptr": seed, "eps": rows.settings.eps}
    shared |= {"lse_ptr": results["lse"], "nll_ptr": results["nll"]}
    _thin_entries_kernel[(mask.shape[0],)](counts_ptr=counts, **shared)
    _list_entries_kernel[(mask.shape[0],)](
        offsets_ptr=offsets_of(counts, out=results["offsets"]),
        columns_ptr=columns,
        values_ptr=results["values"],
        capacity=columns.numel(),
        VALUES=True,
        **shared,
    )


def _where(
    mask: Tensor, target: Tensor, order: Tensor | None, count: Tensor | None, first_row: int
) -> dict[str, object]:
    """The arguments that all kernels over the bits of rows take."""
    words = mask.shape[1]
    return {
        "mask_ptr": mask,
        "target_ptr": target,
        "order_ptr": order,
        "count_ptr": count,
        "first_row": first_row,
        "words": words,
        "BLOCK": min(1024, triton.next_power_of_2(words)),
    }
