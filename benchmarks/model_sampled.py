"""The sampled call as the model sees it, as built and as it could be; and what is aimed at."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.model_entries import DENSE, FLOOR, SPLITS, Kept
from benchmarks.model_hardware import LATENCY, Gpu
from benchmarks.model_kernels import Kernel, elementwise, empty_programs, product
from benchmarks.model_ours import (
    exact,
    forward,
    issue_seconds,
    logits_chunks,
    over_logits,
    prologue,
    recomputed,
    small,
    sweep,
    wide_logits,
)
from benchmarks.model_static import compiled
from benchmarks.shapes import Shape
from bft_kernels.plan import DEFAULT_ACCELERATOR_BUFFER_BYTES

# Bytes that sorting by column moves for each place of the list: keys and rows are made (60), a
# radix sort of 4 passes carries 4-byte keys and 8-byte places (110), rows and values follow them
# (36), and places in the dense table are found (44).
SORT_BYTES = 250


@dataclass(frozen=True)
class Design:
    """How the sampled call is built: as it is, or as it could be."""

    name: str
    splits: int | None = None  # parts of the vocabulary in the tiled forward; None: four waves
    chunked: bool = False  # the vendor's product and two passes over its logits instead
    floor: bool = False  # the sum over a part of the vocabulary is known before
    room: bool = False  # lists have room for all that is listed
    overlapped: bool = False  # gathers never wait: bytes and instructions alone count


BUILT = Design("as built")


def _overlapped(design: Design) -> Design:
    return replace(design, name=f"{design.name}, gathers overlapped", overlapped=True)


def lists(shape: Shape, gpu: Gpu, listed: float) -> list[Kernel]:
    """Bits become columns: a pass that counts and one that writes, 1024 words at a time."""
    count, listing = (compiled(gpu.target, f"{name}_entries") for name in ("count", "list"))
    words = shape.vocabulary / 32
    steps = shape.tokens * math.ceil(words / count.block["BLOCK"])
    mask = 4 * words * shape.tokens
    each = listing.outer - listing.inner + 32 * listing.inner
    return [
        Kernel("count", issue=issue_seconds(count, steps, count.outer, gpu), memory=mask),
        small("offsets", 6, 40 * shape.tokens),
        Kernel(
            "list",
            issue=issue_seconds(listing, steps, each, gpu),
            memory=mask + 4 * listed * shape.tokens,
        ),
    ]


def gathers(
    shape: Shape, gpu: Gpu, rows: float, listed: float, kept: Kept, *, known: bool
) -> list[Kernel]:
    """``dH`` of ``rows`` whose lists are ``listed`` long: each row of ``weight`` is fetched once.

    A program waits for the columns, then for the rows, then does both sums: nothing of it overlaps
    but other programs of the multiprocessor. The instructions are those of the compiled loop.

    Args:
        shape, gpu: of the call.
        rows: tokens.
        listed: columns of each.
        kept: what is kept of them, and the hit rates.
        known: whether only kept entries are listed.
    """
    figures = compiled(gpu.target, "gather_hidden")
    steps = rows * math.ceil(listed / figures.block["BLOCK_K"])
    row_bytes = 2 * shape.width
    hits = kept.hits_at(gpu.cache / row_bytes, listed=not known)
    fetched = rows * listed * row_bytes
    return [
        Kernel(
            "gather dH",
            issue=issue_seconds(figures, steps, figures.outer, gpu),
            wait=steps * 2 * LATENCY / gpu.processors,
            resident=figures.resident,
            memory=fetched * (1 - hits) + 2 * rows * row_bytes,
            cache=fetched,
        )
    ]


def columns_of_weight(shape: Shape, gpu: Gpu, rows: float, kept: Kept, room: float) -> list[Kernel]:
    """``dW``: entries sorted by column, rows of ``hidden`` fetched for each; the densest dense.

    Programs take a column and 1024 elements of its row; slices of ``hidden`` that long are kept by
    the second-level cache.
    """
    figures = compiled(gpu.target, "gather_weight")
    width, row_bytes = shape.width, 2 * shape.width
    slices = math.ceil(width / figures.block["BLOCK_D"])
    entries = rows * kept.entries * (1 - kept.common)
    touched = max(0.0, kept.distinct_at(round(rows)) - DENSE) if rows else 0.0
    steps = touched + entries / figures.block["BLOCK_K"]
    working_set = shape.tokens * row_bytes / slices
    again = 0.0 if working_set <= gpu.cache else entries * row_bytes
    return [
        small("sort by column", 45, SORT_BYTES * room * shape.tokens),
        Kernel(
            "gather dW",
            issue=issue_seconds(figures, slices * steps, figures.outer, gpu),
            wait=slices * (touched + steps) * 2 * LATENCY / gpu.processors,
            resident=figures.resident,
            memory=touched * width * (2 + 2) + shape.tokens * row_bytes + again,
            cache=entries * row_bytes,
        ),
        empty_programs(
            "gather dW, empty programs",
            slices * (shape.vocabulary - touched),
            figures.resident,
            gpu,
        ),
        # P [DENSE, N] in two parts, and a copy of hidden without its ignored rows.
        product("dense dW", DENSE, width, shape.tokens, gpu, out=4).times(2),
        small("dense table", 14, DENSE * shape.tokens * 28 + 4 * shape.tokens * width),
    ]


def sampled(
    shape: Shape, gpu: Gpu, kept: Kept, design: Design = BUILT, *, trains_weight: bool = True
) -> list[Kernel]:
    """Forward, ``dH`` and, unless the head is frozen, ``dW``.

    Lists have room for ``0.25 / eps`` entries a token, 65 at least; tokens whose lists lie past it
    are computed again.
    """
    splits = design.splits or SPLITS[0]
    listed = kept.entries if design.chunked else kept.listed[splits]
    if design.floor:
        listed = kept.listed_floor[splits]
    room = listed if design.room or design.chunked else max(64, 0.25 / kept.eps) + 1
    fits = min(1.0, room / listed) * shape.tokens
    kernels = [prologue(shape), small("floor", 1, 4 * shape.tokens * shape.width)]
    if design.floor:
        part = replace(shape, vocabulary=math.ceil(shape.vocabulary * FLOOR))
        kernels.append(over_logits("sum over a part", "linear_nll_forward", part, gpu))
    if design.chunked:
        for rows in logits_chunks(shape, DEFAULT_ACCELERATOR_BUFFER_BYTES):
            kernels += wide_logits(rows, shape, gpu, copied=False)
            kernels.append(sweep(rows, shape, gpu, "sweep", "sweep_rows", 4))
            kernels.append(sweep(rows, shape, gpu, "list while reading", "gradient_rows", 4))
    else:
        mask = shape.tokens * shape.vocabulary / 8
        name = "linear_nll_forward emit"
        kernels.append(over_logits("forward", name, shape, gpu, mask, splits=design.splits))
        kernels.append(small("combine", 1, 24 * shape.tokens * splits))
        kernels += lists(shape, gpu, listed)
    gathered = gathers(shape, gpu, fits, listed, kept, known=design.chunked or design.floor)
    if trains_weight:
        kernels.append(elementwise("dW zeroed", shape.vocabulary * shape.width, 0, 2))
        gathered += columns_of_weight(shape, gpu, fits, kept, room)
    if design.overlapped:
        gathered = [replace(kernel, resident=1 << 30) for kernel in gathered]
    kernels += gathered
    if not design.chunked:
        rest = shape.tokens - fits
        kernels += recomputed(shape, gpu, rest, sampled=True, trains_weight=trains_weight)
    kernels.append(elementwise("dH zeroed", shape.tokens * shape.width, 0, 2))
    return kernels


@dataclass(frozen=True)
class Goal:
    """A time that is aimed at, in G."""

    name: str
    limit: float
    eps: float | None  # of the sampled gradient
    kernels: Callable[[Shape, Gpu, Kept], list[Kernel]]


GOALS = [
    Goal("sampled, eps 2^-10", 1.4, 2**-10, sampled),
    Goal("sampled, eps 2^-8", 1.25, 2**-8, sampled),
    Goal(
        "sampled, frozen head, eps 2^-10",
        1.25,
        2**-10,
        lambda shape, gpu, kept: sampled(shape, gpu, kept, trains_weight=False),
    ),
    Goal("exact, chunked", 3.4, None, lambda shape, gpu, _: exact(shape, gpu)),
    Goal("forward only", 1.15, None, lambda shape, gpu, _: forward(shape, gpu)),
]
# What would change them; but for the first, none is built.
_FLOOR = Design("sum of V / 32 known, lists with room", floor=True, room=True)
_FILLED = replace(_FLOOR, name="sum known, room, 2 splits", splits=2)
_CHUNKED = Design("vendor's product, lse known", chunked=True)
DESIGNS = [
    BUILT,
    Design("lists with room", room=True),
    Design("2 splits, lists with room", splits=2, room=True),
    _FLOOR,
    _FILLED,
    _overlapped(_FILLED),
    _CHUNKED,
    _overlapped(_CHUNKED),
]
