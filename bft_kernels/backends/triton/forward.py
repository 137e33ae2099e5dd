"""The tiled forward: logits live in registers, and only a few sums for each row leave them.

The vocabulary is cut into splits, so that few rows fill the GPU too. A program takes a block of
rows and a split, and goes over its tiles of columns with running sums. A second, small kernel joins
the splits of each row, always in the same order. For the sampled gradient a tile leaves one bit for
each entry that may be kept: 32 to a word, so that nothing is compacted in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bft_kernels.backends.common.inputs import Inputs
from bft_kernels.backends.common.tiles import candidate_masks
from bft_kernels.backends.triton.certificate import certify
from bft_kernels.backends.triton.configs import has_whole_words, tile_for
from bft_kernels.backends.triton.device import (
    EXP_MARGIN,
    LOG2E,
    ROUNDING,
    finite_or,
    logit_tile,
    may_be_below,
    row_key,
    store_results,
    swizzle,
)
from bft_kernels.backends.triton.entries import list_candidates
from bft_kernels.backends.triton.inputs import RowResults, call_of, splits_of, tile_arguments
from bft_kernels.backends.triton.lse_bound import find_bounds

# Sums that a split leaves for each row, [SUMS, SPLITS, rows] float32.
MAXIMUM = tl.constexpr(0)  # of z
TOTAL = tl.constexpr(1)  # e = exp(z - maximum)
MOMENT = tl.constexpr(2)  # e * (z - maximum), for the entropy
SHIFTED = tl.constexpr(3)  # z - maximum, for label smoothing
TARGET = tl.constexpr(4)  # the target's z, in the split that has it; undefined elsewhere
BEFORE = tl.constexpr(5)  # below TARGET exactly if all z before the target's in the split are
SUMS = 6


@triton.jit
def _store_bits(
    e,  # [BLOCK_N, WORDS, 32], every other word of a tile
    overrated,  # [BLOCK_N], e times this is an upper bound of 2^16 p / eps
    multiplier,
    offset,
    first,  # number of the first word
    mask_rows,  # pointers [BLOCK_N, 1]
    mask_n,
    words,
    WORDS: tl.constexpr,
    WHOLE_WORDS: tl.constexpr,
):
    """One bit for each entry whose draw may be below ``p / eps``: 32 to a word, lowest first."""
    word = first + tl.arange(0, WORDS) * 2
    bit = tl.arange(0, 32)
    if WHOLE_WORDS:  # each bit's number is a constant: an entry's place is one multiply-add
        start = multiplier[:, None] * (word * 32).to(tl.uint32)[None, :] + offset[:, None]
        place = start[:, :, None] + multiplier[:, None, None] * bit.to(tl.uint32)[None, None, :]
    else:
        columns = (word[:, None] * 32 + bit[None, :]).to(tl.uint32)[None, :, :]
        place = multiplier[:, None, None] * columns + offset[:, None, None]
    keep = may_be_below(place, e, overrated[:, None, None])
    value = (tl.full([], 1, tl.int32) << bit)[None, None, :]
    packed = tl.sum(tl.where(keep, value, 0), axis=2)
    mask = mask_n[:, None] & (word < words)[None, :]
    tl.store(mask_rows + word[None, :], packed, mask=mask)


@triton.jit(do_not_specialize=["first_row", "rows", "splits", "tiles"])
def _linear_nll_forward_kernel(
    x,
    call,
    seed_ptr,  # []; this and the next two for the sampled gradient only
    lse_bound_ptr,  # [N], a lower bound of lse
    mask_ptr,  # [R, WORDS], a bit for each entry that may be kept, or None
    sums_ptr,  # [SUMS, SPLITS, R]
    first_row,  # of the R rows of this launch, among the labelled
    rows,  # R
    words,
    splits,
    tiles,  # of a split
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    STATISTICS: tl.constexpr,
    WHOLE_WORDS: tl.constexpr,  # whether a thread has all of a word's entries
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_blocks = tl.cdiv(rows, BLOCK_N)
    block, split = swizzle(tl.program_id(0), row_blocks, splits, GROUP)
    count, V = tl.load(call.count_ptr), call.V
    if first_row + block * BLOCK_N >= count:
        return
    local = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = (local < rows) & (first_row + local < count)
    row = tl.load(call.order_ptr + first_row + local, mask=mask_n, other=0)
    target = tl.load(call.target_ptr + row, mask=mask_n, other=0)

    m = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    base = tl.full((BLOCK_N,), float("-inf"), tl.float32)  # of the powers of 2, m * LOG2E rounded
    total = tl.zeros((BLOCK_N,), tl.float32)
    moment = tl.zeros((BLOCK_N,), tl.float32)
    shifted = tl.zeros((BLOCK_N,), tl.float32)
    at_sum = sums_ptr + split * rows + local
    plane = splits * rows
    if mask_ptr is not None:
        lse_bound = tl.load(lse_bound_ptr + row, mask=mask_n, other=0.0)
        multiplier, offset = row_key(tl.load(seed_ptr), row)

    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(V, BLOCK_V))):
        offs_v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        z = logit_tile(x, call, row, offs_v, D, BLOCK_D, OPERAND, PRECISION)
        # One tile in many holds a target or is cut off by the end of the vocabulary. Only there the
        # program looks for a target's logit and for those before it, and masks columns.
        at = target - tile * BLOCK_V
        here = (at >= 0) & (at < BLOCK_V) & mask_n
        if (tl.max(here.to(tl.int32), axis=0) > 0) | ((tile + 1) * BLOCK_V > V):
            z = tl.where((offs_v < V)[None, :], z, float("-inf"))
            inside = tl.arange(0, BLOCK_V)[None, :]
            place = tl.where(here, at, -1).to(tl.int32)[:, None]
            own = tl.max(tl.where(inside == place, z, float("-inf")), axis=1)
            tl.store(at_sum + TARGET * plane, own, mask=here)
            if STATISTICS:
                ahead = (inside < place) & (z >= own[:, None])
                lower = tl.where(tl.max(ahead.to(tl.int32), axis=1) > 0, own, float("-inf"))
                tl.store(at_sum + BEFORE * plane, tl.maximum(lower, m), mask=here)

        m_new = tl.maximum(m, tl.max(z, axis=1))
        # Where nothing finite came yet, exp(-inf - (-inf)) would be NaN.
        reference = finite_or(m_new, 0.0)
        # Powers of 2, from one multiply-add: its product is not rounded, and the base is exact.
        new_base = reference * LOG2E
        if mask_ptr is not None:
            # The sum before this tile bounds the final lse from below, so that p is overrated. This
            # tile's own sum is left out, so that no entry has to wait for it.
            bound = tl.maximum(finite_or(m, 0.0) + tl.log(total), lse_bound)
            overrated = tl.exp(reference - bound + EXP_MARGIN + ROUNDING * tl.abs(bound)) * (
                65536.0 / call.eps
            )
        power = tl.fma(z, LOG2E, -new_base[:, None])
        e = tl.exp2(power)
        # The base falls only from the 0 that stands for -inf, and then the total is 0.
        scale = tl.exp2(tl.minimum(base - new_base, 0.0))
        if STATISTICS:
            step = tl.where(total > 0, total * (base - new_base), 0.0)
            terms = e * tl.maximum(power, -1e30)
            moment = scale * (moment + step) + tl.sum(terms, axis=1)
        if call.label_smoothing is not None:
            done = tl.minimum(tile * BLOCK_V, V) - split * tiles * BLOCK_V
            step = tl.where(done > 0, (m - reference) * done, 0.0)
            difference = tl.where((offs_v < V)[None, :], z - reference[:, None], 0.0)
            shifted += step + tl.sum(difference, axis=1)
        total = scale * total + tl.sum(e, axis=1)
        m, base = m_new, new_base
        if mask_ptr is not None:
            mask_rows = mask_ptr + local.to(tl.int64)[:, None] * words
            # Each half takes every other word, so that a thread holds the draws of half as many
            # entries, and all of them are its own.
            pairs = tl.reshape(e, (BLOCK_N, BLOCK_V // 64, 2, 32))
            even, odd = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
            for half in tl.static_range(1, -1, -1):  # fewer instructions than the other order
                _store_bits(
                    even if half == 0 else odd,
                    overrated,
                    multiplier,
                    offset,
                    tile * (BLOCK_V // 32) + half,
                    mask_rows,
                    mask_n,
                    words,
                    BLOCK_V // 64,
                    WHOLE_WORDS,
                )

    # From powers of 2 relative to the base to powers of e relative to the maximum.
    rest = tl.fma(finite_or(m, 0.0), LOG2E, -finite_or(base, 0.0))
    scale = tl.exp2(-rest)
    tl.store(at_sum + MAXIMUM * plane, m, mask=mask_n)
    tl.store(at_sum + TOTAL * plane, scale * total, mask=mask_n)
    if STATISTICS:
        moment = scale * (moment - total * rest) * (1.0 / LOG2E)
        tl.store(at_sum + MOMENT * plane, moment, mask=mask_n)
    if call.label_smoothing is not None:
        tl.store(at_sum + SHIFTED * plane, shifted, mask=mask_n)


@triton.jit(do_not_specialize=["first_row", "rows", "splits"])
def _combine_kernel(
    call,
    sums_ptr,  # [SUMS, SPLITS, R]
    out,  # RowResults
    first_row,
    rows,  # R
    splits,
    split_columns,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,  # how many are read at a time
):
    """Joins the splits of each row, in order, and stores the row's results."""
    V = call.V
    local = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (local < rows) & (first_row + local < tl.load(call.count_ptr))
    row = tl.load(call.order_ptr + first_row + local, mask=mask, other=0)
    step = splits * rows
    at = sums_ptr + local

    target = tl.load(call.target_ptr + row, mask=mask, other=0)
    holder = tl.minimum(tl.maximum(target // split_columns, 0), splits - 1)
    own = tl.load(at + TARGET * step + holder * rows, mask=mask, other=0.0)
    own = tl.where((target >= 0) & (target < V), own, float("nan"))  # an unchecked target

    m = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        there = mask[None, :] & (split < splits)[:, None]
        here = at[None, :] + split[:, None] * rows
        peak = tl.load(here + MAXIMUM * step, mask=there, other=float("-inf"))
        m = tl.maximum(m, tl.max(peak, axis=0))
    reference = finite_or(m, 0.0)

    total = tl.zeros((BLOCK,), tl.float32)
    moment = tl.zeros((BLOCK,), tl.float32)
    shifted = tl.zeros((BLOCK,), tl.float32)
    earlier = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        there = mask[None, :] & (split < splits)[:, None]
        here = at[None, :] + split[:, None] * rows
        peak = tl.load(here + MAXIMUM * step, mask=there, other=float("-inf"))
        part = tl.load(here + TOTAL * step, mask=there, other=0.0)
        difference = peak - reference[None, :]
        scale = tl.exp(difference)
        total += tl.sum(part * scale, axis=0)
        if out.entropy_ptr is not None:
            part_moment = tl.load(here + MOMENT * step, mask=there, other=0.0)
            terms = scale * (part_moment + tl.where(part > 0, part * difference, 0.0))
            moment += tl.sum(terms, axis=0)
            # Columns before the target's must hold less; later ones may equal it.
            lower = tl.where(split[:, None] < holder[None, :], peak, float("-inf"))
            earlier = tl.maximum(earlier, tl.max(lower, axis=0))
        if call.label_smoothing is not None:
            columns = tl.minimum(tl.maximum(V - split * split_columns, 0), split_columns)
            terms = tl.load(here + SHIFTED * step, mask=there, other=0.0)
            terms += (finite_or(peak, 0.0) - reference[None, :]) * columns[:, None]
            shifted += tl.sum(tl.where(there, terms, 0.0), axis=0)

    first = own == m
    if out.entropy_ptr is not None:
        before = tl.load(at + BEFORE * step + holder * rows, mask=mask, other=0.0)
        first = first & (before < own) & (earlier < own)
    store_results(out, row, mask, total, reference, own, moment, first, shifted, call)


def _forward(
    inputs: Inputs,
    results: dict[str, Tensor],  # [N] each, or [0]
    first_row: int,
    rows: int,
    lse_bounds: Tensor | None = None,  # [N], for a mask
    mask: Tensor | None = None,
) -> None:
    """Results of the labelled rows ``first_row`` to ``first_row + rows``, or to the last one.

    ``mask [rows, ceil(V / 32)]`` int32 gets a bit for each entry that may be kept.
    """
    call = inputs.call
    splits = splits_of(inputs, rows)
    tile = splits.tile
    sums = torch.empty(SUMS, splits.count, rows, dtype=torch.float32, device=inputs.hidden.device)
    part = {"sums_ptr": sums, "first_row": first_row, "rows": rows, "splits": splits.count}
    _linear_nll_forward_kernel[(splits.row_blocks * splits.count,)](
        seed_ptr=None if mask is None else call.seed,
        lse_bound_ptr=lse_bounds,
        mask_ptr=mask,
        words=triton.cdiv(inputs.shape[1], 32),
        tiles=splits.tiles,
        STATISTICS=call.statistics,
        WHOLE_WORDS=mask is not None and has_whole_words(call.operand),
        **part,
        **tile_arguments(inputs, tile),
    )
    _combine_kernel[(triton.cdiv(rows, 32),)](
        call=call_of(inputs),
        split_columns=splits.tiles * tile.block_v,
        BLOCK=32,
        SPLITS=16,
        **part,
        out=RowResults.of(results),
    )


def run_tiles(inputs: Inputs, results: dict[str, Tensor]) -> None:
    """See :meth:`bft_kernels.backends.common.on_device.Kernels.run_tiles`."""
    if inputs.call.saved == "entries":
        lse_bounds = find_bounds(inputs)
        unit = tile_for(inputs.call, inputs.hidden, inputs.weight).block_n
        for first, mask in candidate_masks(inputs, unit):
            _forward(inputs, results, first, mask.shape[0], lse_bounds, mask)
            list_candidates(inputs, mask, first, results)
    else:
        _forward(inputs, results, 0, inputs.shape[0])
    if inputs.call.variance:
        certify(inputs, results)
