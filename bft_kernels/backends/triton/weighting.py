"""Token and sequence weights, each token's coefficient, and the loss, in three launches.

``_close_gaps_kernel`` numbers the labelled positions and lists their values without gaps.
``_window_kernel`` makes the windows, the token weights and, tile by tile, the lowest window of each
document. ``_weigh_kernel`` joins the tiles of a document, and weighs it and its tokens. A
document is spread over as many programs as it has tiles of positions. Nothing waits for the device,
and nothing depends on the order in which programs run.
"""

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from bft_kernels.backends.common.weighted import WeightingInputs, balanced_loss_by, weigh_by
from bft_kernels.backends.triton.configs import interpreted
from bft_kernels.weighting import DELTA

# Positions of a program in the first kernel, labels it counts at a time, and positions (or
# documents) of a program in the others. In the interpreter they are few: tests have many programs.
NUMBERED, COUNTED, TILE = (16, 32, 32) if interpreted() else (256, 2048, 64)


@triton.jit
def _confidence(nll):
    """``exp(-nll)``, rounded once: float32's ``exp`` loses digits where the loss is large."""
    return tl.exp(-nll.to(tl.float64)).to(tl.float32)


@triton.jit
def _bound(cu_ptr, at, mask, N):
    """A boundary that nobody checked, as a position inside the batch."""
    return tl.minimum(tl.maximum(tl.load(cu_ptr + at, mask=mask, other=0), 0), N).to(tl.int32)


@triton.jit(
    do_not_specialize=["N", "S", "steps"],
    do_not_specialize_on_alignment=["nll_ptr", "labelled_ptr"],  # parts of longer vectors
)
def _close_gaps_kernel(
    nll_ptr,  # [N]
    labelled_ptr,  # [N] bool
    cu_ptr,  # [S + 1]
    before_ptr,  # [N + 1] int32, labels before each position
    sequence_ptr,  # [N] int32, the document of each position; S behind the last
    values_ptr,  # [N], values that windows average, of labelled positions without gaps
    N,
    S,
    steps,  # how many a search of S + 1 places takes
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    GEOMETRIC: tl.constexpr,
):
    """A program counts the labels before its block by itself: a launch would cost more."""
    first = tl.program_id(0) * BLOCK
    found = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, first, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        found += tl.load(labelled_ptr + offs, mask=offs < first, other=0).to(tl.int32)
    position = first + tl.arange(0, BLOCK)
    mask = position < N
    labelled = tl.load(labelled_ptr + position, mask=mask, other=0).to(tl.int32)
    slot = tl.sum(found, axis=0) + tl.cumsum(labelled, axis=0) - labelled
    tl.store(before_ptr + position, slot, mask=position <= N)

    nll = tl.load(nll_ptr + position, mask=mask, other=0.0)
    value = -nll if GEOMETRIC else _confidence(nll)
    tl.store(values_ptr + slot, value, mask=mask & (labelled != 0))

    # How many documents end at or before the position.
    low = tl.zeros((BLOCK,), tl.int32)
    high = low + S
    for _ in range(steps):
        searching = low < high
        middle = (low + high) // 2
        ended = tl.load(cu_ptr + 1 + middle, mask=searching, other=0) <= position
        low = tl.where(searching & ended, middle + 1, low)
        high = tl.where(searching & (ended == 0), middle, high)
    tl.store(sequence_ptr + position, low, mask=mask)


@triton.jit
def _value(values_ptr, at, stop):
    return tl.load(values_ptr + at, mask=at < stop, other=0.0)


@triton.jit
def _window_sums(values_ptr, start, stop, GEOMETRIC: tl.constexpr):
    """``values[start:stop].sum()`` in float64, lane by lane.

    Values of one sign are added in pairs, eight to a float32: three roundings, however long the
    window and however small the values; the contract is 1e-6. Logarithms need an absolute accuracy,
    and are widened before they are added.
    """
    total = tl.zeros(start.shape, tl.float64)
    longest = tl.max(stop - start, axis=0)
    for j in range(0, longest, 8):
        at = start + j
        if GEOMETRIC:
            for i in tl.static_range(8):
                total += _value(values_ptr, at + i, stop).to(tl.float64)
        else:
            a = _value(values_ptr, at, stop) + _value(values_ptr, at + 1, stop)
            b = _value(values_ptr, at + 2, stop) + _value(values_ptr, at + 3, stop)
            c = _value(values_ptr, at + 4, stop) + _value(values_ptr, at + 5, stop)
            d = _value(values_ptr, at + 6, stop) + _value(values_ptr, at + 7, stop)
            total += ((a + b) + (c + d)).to(tl.float64)
    return total


@triton.jit(
    do_not_specialize=["N", "S", "window"],
    do_not_specialize_on_alignment=["nll_ptr", "labelled_ptr"],
)
def _window_kernel(
    nll_ptr,  # [N]
    labelled_ptr,  # [N] bool
    cu_ptr,  # [S + 1]
    before_ptr,  # [N + 1]
    sequence_ptr,  # [N]
    values_ptr,  # [N]
    token_weight_ptr,  # [N]
    window_confidence_ptr,  # [N]
    lowest_ptr,  # [N], of the windows of the same document and the same tile; -inf for NaN
    ended_ptr,  # [TILES] int32, documents whose last label lies in the tile
    N,
    S,
    window,
    delta,
    BLOCK: tl.constexpr,
    FULL_WINDOWS: tl.constexpr,
    GEOMETRIC: tl.constexpr,
    CONFIDENCE: tl.constexpr,  # the token weight is the confidence
    RATIO: tl.constexpr,  # or the confidence over its window's; else 1
):
    """A program makes the windows of a tile of positions."""
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = position < N
    labelled = tl.load(labelled_ptr + position, mask=mask, other=0) != 0
    sequence = tl.load(sequence_ptr + position, mask=mask, other=S)
    inside = labelled & (sequence < S)
    slot = tl.load(before_ptr + position, mask=mask, other=0)
    first = tl.load(before_ptr + _bound(cu_ptr, sequence, inside, N), mask=inside, other=0)
    stop = tl.load(before_ptr + _bound(cu_ptr, sequence + 1, inside, N), mask=inside, other=0)
    if FULL_WINDOWS:
        full = tl.minimum(stop - first, window)
        begin = tl.minimum(slot, stop - full)
        end = begin + full
    else:
        begin = tl.maximum(slot - window // 2, first)
        end = tl.minimum(slot + (window - window // 2), stop)
    begin, end = tl.where(inside, begin, 0), tl.where(inside, end, 0)
    length = tl.maximum(end - begin, 1).to(tl.float64)
    mean = _window_sums(values_ptr, begin, end, GEOMETRIC) / length
    if GEOMETRIC:
        mean = tl.exp(mean)
    local = tl.where(inside, mean.to(tl.float32), 0.0)

    token = tl.full((BLOCK,), 1.0, tl.float32)
    if CONFIDENCE or RATIO:
        token = _confidence(tl.load(nll_ptr + position, mask=inside, other=0.0))
    if RATIO:
        token = tl.div_rn(token, local + delta)
        token = tl.where(token > 1.0, 1.0, token)  # keeps a NaN
    tl.store(window_confidence_ptr + position, local, mask=mask)
    tl.store(token_weight_ptr + position, tl.where(inside, token, 0.0), mask=mask)

    # Minima of the hardware drop a NaN.
    sortable = tl.where(local == local, local, float("-inf"))
    sortable = tl.where(inside, sortable, float("inf"))
    same = sequence[:, None] == sequence[None, :]
    lowest = tl.min(tl.where(same, sortable[None, :], float("inf")), axis=1)
    tl.store(lowest_ptr + position, lowest, mask=mask)
    ended = tl.sum((inside & (slot + 1 == stop)).to(tl.int32), axis=0)
    tl.store(ended_ptr + tl.program_id(0), ended)


@triton.jit
def _lowest_windows(lowest_ptr, begin, end, BLOCK: tl.constexpr):
    """The lowest window of the documents at positions ``begin`` to ``end``; inf without labels."""
    lowest = tl.full(begin.shape, float("inf"), tl.float32)
    tile = begin // BLOCK
    tiles = tl.max(tl.where(end > begin, (end - 1) // BLOCK - tile + 1, 0), axis=0)
    for k in range(0, tiles, 8):
        # Eight loads go on at a time, since a long document has many tiles.
        for i in tl.static_range(8):
            here = (tile + k + i) * BLOCK
            last = tl.minimum(here + BLOCK, end) - 1
            found = tl.load(
                lowest_ptr + last, mask=(here < end) & (begin < end), other=float("inf")
            )
            lowest = tl.minimum(lowest, found)
    return tl.where(lowest == float("-inf"), float("nan"), lowest)


@triton.jit(
    do_not_specialize=["N", "S", "tiles"],
    do_not_specialize_on_alignment=["nll_ptr", "labelled_ptr"],
)
def _weigh_kernel(
    nll_ptr,  # [N]
    labelled_ptr,  # [N] bool
    cu_ptr,  # [S + 1]
    before_ptr,  # [N + 1]
    sequence_ptr,  # [N]
    token_weight_ptr,  # [N]
    lowest_ptr,  # [N]
    ended_ptr,  # [TILES]
    num_items_ptr,  # [], the normalizer, or None
    coefficient_ptr,  # [N]
    sums_ptr,  # [TILES], of the weighted losses
    sequence_weight_ptr,  # [S]
    sequence_confidence_ptr,  # [S]
    N,
    S,
    tiles,  # TILES
    gamma,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    FLAT: tl.constexpr,  # documents weigh 1
    GEOMETRIC: tl.constexpr,
    BY_SEQUENCE: tl.constexpr,
    COUNTS: tl.constexpr,  # divides by the documents or labels of this batch
):
    """A program takes a tile of positions; programs past the last tile take as many documents."""
    program = tl.program_id(0)
    position = program * BLOCK + tl.arange(0, BLOCK)
    mask = position < N
    of_sequences = program >= tiles
    own = position - tiles * BLOCK
    sequence = tl.load(sequence_ptr + position, mask=mask, other=S)
    sequence = tl.where(of_sequences, tl.minimum(own, S), sequence)
    known = sequence < S
    begin = _bound(cu_ptr, sequence, known, N)
    end = _bound(cu_ptr, sequence + 1, known, N)
    labels = tl.load(before_ptr + end, mask=known, other=0)
    labels -= tl.load(before_ptr + begin, mask=known, other=0)
    filled = labels > 0
    lowest = tl.where(filled, _lowest_windows(lowest_ptr, begin, end, BLOCK), 0.0)
    weight = tl.full((BLOCK,), 1.0, tl.float32)
    if not FLAT:
        if GEOMETRIC:
            base = tl.where(lowest > 1.0, 1.0, lowest).to(tl.float64)
            weight -= tl.exp(gamma * tl.log(base)).to(tl.float32)
        else:
            weight -= lowest
    weight = tl.where(filled, weight, 0.0)

    if of_sequences:
        tl.store(sequence_weight_ptr + own, weight, mask=own < S)
        tl.store(sequence_confidence_ptr + own, lowest, mask=own < S)
    else:
        token_scale = tl.full((BLOCK,), 1.0, tl.float32)
        if BY_SEQUENCE:
            token_scale = tl.div_rn(token_scale, tl.maximum(labels, 1).to(tl.float32))
        if COUNTS:
            if BY_SEQUENCE:
                found = tl.zeros((CHUNK,), tl.int32)
                for start in range(0, tiles, CHUNK):
                    offs = start + tl.arange(0, CHUNK)
                    found += tl.load(ended_ptr + offs, mask=offs < tiles, other=0)
                count = tl.sum(found, axis=0)
            else:
                count = tl.load(before_ptr + N)
            token_scale = tl.div_rn(token_scale, tl.maximum(count, 1).to(tl.float32))
        if num_items_ptr is not None:
            token_scale = tl.div_rn(token_scale, tl.load(num_items_ptr).to(tl.float32))
        labelled = tl.load(labelled_ptr + position, mask=mask, other=0) != 0
        token = tl.load(token_weight_ptr + position, mask=mask, other=0.0)
        coefficient = tl.where(labelled & known, token_scale * (token * weight), 0.0)
        tl.store(coefficient_ptr + position, coefficient, mask=mask)
        # Where a weight is 0 an infinite loss must not turn the sum into NaN.
        nll = tl.load(nll_ptr + position, mask=mask & (coefficient != 0), other=0.0)
        tl.store(sums_ptr + program, tl.sum(coefficient * nll, axis=0))


def _run(given: WeightingInputs) -> dict[str, Tensor]:
    """See :class:`WeightingInputs`."""
    count, sequences = given.loss.numel(), given.cu_seqlens.numel() - 1
    made, flags, tiles = given.vectors(TILE), given.flags, triton.cdiv(count, TILE)

    def taken(*names: str) -> dict[str, Tensor]:
        return {f"{name}_ptr": made[name] for name in names}

    shared = {
        "nll_ptr": given.loss,
        "labelled_ptr": given.labelled,
        "cu_ptr": given.cu_seqlens,
        "N": count,
        "S": sequences,
        "GEOMETRIC": flags.geometric,
        **taken("before", "sequence"),
    }
    of_tiles = {"BLOCK": TILE, "num_warps": 2, **taken("token_weight", "lowest", "ended"), **shared}
    _close_gaps_kernel[(triton.cdiv(count + 1, NUMBERED),)](
        steps=sequences.bit_length(),
        BLOCK=NUMBERED,
        CHUNK=COUNTED,
        **taken("values"),
        **shared,
    )
    _window_kernel[(tiles,)](
        window=min(given.settings.window, 2 * count + 2),  # as good as any longer one, and int32
        delta=DELTA,
        FULL_WINDOWS=flags.full_windows,
        CONFIDENCE=flags.confidence,
        RATIO=flags.ratio,
        **taken("values", "window_confidence"),
        **of_tiles,
    )
    _weigh_kernel[(tiles + triton.cdiv(sequences, TILE),)](
        num_items_ptr=given.num_items,
        tiles=tiles,
        gamma=given.settings.gamma,
        CHUNK=COUNTED,
        FLAT=flags.flat,
        BY_SEQUENCE=flags.by_sequence,
        COUNTS=flags.counts,
        **taken("coefficient", "sums", "sequence_weight", "sequence_confidence"),
        **of_tiles,
    )
    return made


balanced_loss = partial(balanced_loss_by, _run)
weigh = partial(weigh_by, _run)
