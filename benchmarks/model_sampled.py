"""The sampled call as the model sees it, as built and as it could be; and what is aimed at."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.model_entries import DENSE, DENSER, SPLITS, Kept
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
from bft_kernels.backends.gpu.floor import POPULAR
from bft_kernels.backends.gpu.lists import capacity_for
from bft_kernels.plan import DEFAULT_ACCELERATOR_BUFFER_BYTES

# Bytes that sorting by column moves for each place of the list: keys are filled in (4), a radix
# sort of 4 passes carries 4-byte keys and 8-byte places (110), rows and values follow them (36),
# and a kernel looks for those of the dense table (20).
SORT_BYTES = 170
# Bits of the fullest word among the 1024 that a program goes through together: of Qwen2.5's and
# SmolLM2's text 1 to 4 on average for eps of 2^-8 and 2^-10, and 6 at most for 2^-12.
FULLEST = 4
# Loads that a program of a gather waits for one after the other before its first sum.
PROLOGUE = 3
# What memory gives at least, bytes.
SECTOR = 32


@dataclass(frozen=True)
class Design:
    """How the sampled call is built: as it is, or as it could be."""

    name: str
    tiled: bool = False  # logits in registers: what small budgets take
    second_pass: bool = False  # no bits: a second pass over the buffer lists what is kept
    dense: int = DENSE  # commonest columns that take a dense product in dW
    dense_hidden: bool = False  # and in dH


BUILT = Design("as built")


def bits_to_lists(shape: Shape, gpu: Gpu, rows: int, kept: Kept, *, tiled: bool) -> list[Kernel]:
    """Bits become columns: a pass that counts and one that writes, 1024 words at a time.

    In chunks the first looks at each candidate's logit again, the second at what is kept.
    """
    first, second = ("count_entries", "list_entries")
    if not tiled:
        first, second = "thin_entries", "list_entries values"
    words = shape.vocabulary / 32
    mask = 4 * words * rows

    def make(name: str, kernel: str, moved: float, looked: float) -> Kernel:
        figures = compiled(gpu.target, kernel)
        steps = rows * math.ceil(words / figures.block["BLOCK"])
        each = figures.outer
        if figures.inner:
            each += (FULLEST - 1) * figures.inner
        waits = 1 + (FULLEST if looked else 0)
        return Kernel(
            name,
            issue=issue_seconds(figures, steps, each, gpu),
            wait=steps * waits * LATENCY / gpu.processors,
            resident=figures.resident,
            memory=moved + SECTOR * looked * rows,
        )

    if tiled:
        return [
            make("count", first, mask, 0),
            small("offsets", 3, 40 * shape.tokens),
            make("list", second, mask + 4 * kept.listed_popular * rows, 0),
        ]
    return [
        make("thin", first, 2 * mask, kept.candidates),
        small("offsets", 3, 40 * shape.tokens),
        make("list", second, mask + 8 * kept.entries * rows, kept.entries),
    ]


def gathers(
    shape: Shape, gpu: Gpu, rows: float, kept: Kept, design: Design, *, entries: bool
) -> list[Kernel]:
    """``dH`` of ``rows`` of the tokens: each listed row of ``weight`` is fetched once.

    A program waits for its place in the list, the first columns and the first rows. From then on
    two tiles are on their way, 32 KiB each: more than what a multiprocessor is given in the time
    that a load takes. The instructions are those of the compiled loop.

    Args:
        shape, gpu: of the call.
        rows: tokens.
        kept: what is kept and listed of them, and the hit rates.
        design: the tiled one's lists hold candidates and no values.
        entries: whether the entries are written for ``dW``.
    """
    figures = compiled(gpu.target, "gather_hidden" if design.tiled else "gather_hidden values")
    listed = kept.listed_popular if design.tiled else kept.entries
    row_bytes = 2 * shape.width
    made = []
    if design.dense_hidden:
        listed *= 1 - kept.common[design.dense]
        # P [N, dense] in two parts.
        dense = product("dense dH", shape.tokens, shape.width, design.dense, gpu, out=4)
        made = [dense.times(2), small("dense table of dH", 10, shape.tokens * design.dense * 16)]
    steps = rows * math.ceil(listed / figures.block["BLOCK_K"])
    rows_held = gpu.cache / row_bytes
    hits = kept.hits_at(rows_held, listed=design.tiled, rare=design.dense_hidden)
    fetched = rows * listed * row_bytes
    moved = rows * (listed * 8 + kept.entries * 12 * entries)
    gather = Kernel(
        "gather dH",
        issue=issue_seconds(figures, steps, figures.outer, gpu),
        wait=rows * PROLOGUE * LATENCY / gpu.processors,
        resident=figures.resident,
        memory=fetched * (1 - hits) + 2 * rows * row_bytes + moved,
        cache=fetched,
    )
    return [gather, *made]


def columns_of_weight(
    shape: Shape, gpu: Gpu, rows: float, kept: Kept, dense: int = DENSE
) -> list[Kernel]:
    """``dW``: entries sorted by column, rows of ``hidden`` fetched for each; the densest dense.

    Programs take a column and 2048 elements of its row, and write it, entries or none; slices of
    ``hidden`` that long are kept by the second-level cache.
    """
    figures = compiled(gpu.target, "gather_weight")
    room = capacity_for(shape.tokens, shape.vocabulary, kept.eps)
    width, row_bytes = shape.width, 2 * shape.width
    slices = math.ceil(width / figures.block["BLOCK_D"])
    entries = rows * kept.entries * (1 - kept.common[dense])
    touched = max(0.0, kept.distinct_at(round(rows)) - dense) if rows else 0.0
    steps = touched + entries / figures.block["BLOCK_K"]
    working_set = shape.tokens * row_bytes / slices
    again = 0.0 if working_set <= gpu.cache else entries * row_bytes
    return [
        small("sort by column", 30, SORT_BYTES * room),
        Kernel(
            "gather dW",
            issue=issue_seconds(figures, slices * steps, figures.outer, gpu),
            wait=slices * touched * PROLOGUE * LATENCY / gpu.processors,
            resident=figures.resident,
            memory=shape.vocabulary * width * 2 + shape.tokens * row_bytes + again,
            cache=entries * row_bytes,
        ),
        empty_programs(
            "gather dW, empty programs",
            slices * (shape.vocabulary - touched),
            figures.resident,
            gpu,
        ),
        # P [dense, N] in two parts, and a copy of hidden without its ignored rows.
        product("dense dW", dense, width, shape.tokens, gpu, out=4).times(2),
        small("dense table", 30, dense * shape.tokens * 36 + 4 * shape.tokens * width),
    ]


def sampled(
    shape: Shape, gpu: Gpu, kept: Kept, design: Design = BUILT, *, trains_weight: bool = True
) -> list[Kernel]:
    """Forward, ``dH`` and, unless the head is frozen, ``dW``.

    Tokens whose lists find no room are computed again.
    """
    room = capacity_for(shape.tokens, shape.vocabulary, kept.eps) / shape.tokens
    listed = kept.listed_popular if design.tiled else kept.entries
    fits = min(1.0, room / listed) * shape.tokens
    kernels = [prologue(shape), small("popular columns", 8, 40 * shape.tokens)]
    if design.tiled:
        kernels += _tiled_forward(shape, gpu, kept)
    else:
        kernels += _chunked_forward(shape, gpu, kept, design)
    gathered = gathers(shape, gpu, fits, kept, design, entries=trains_weight)
    if trains_weight:
        gathered += columns_of_weight(shape, gpu, fits, kept, design.dense)
    kernels += gathered
    rest = shape.tokens - fits
    kernels += recomputed(shape, gpu, rest, sampled=True, trains_weight=trains_weight)
    kernels.append(elementwise("dH zeroed", shape.tokens * shape.width, 0, 2))
    return kernels


def _chunked_forward(shape: Shape, gpu: Gpu, kept: Kept, design: Design) -> list[Kernel]:
    """The vendor's product into a buffer, bits, and lists of what is kept."""
    budget = DEFAULT_ACCELERATOR_BUFFER_BYTES
    if not design.second_pass:
        budget = budget * 32 // 33  # bits are taken out of it
    kernels: list[Kernel] = []
    for rows in logits_chunks(shape, budget):
        kernels += wide_logits(rows, shape, gpu)
        if design.second_pass:
            kernels.append(sweep(rows, shape, gpu, "sweep", "sweep_rows", 4))
            kernels.append(sweep(rows, shape, gpu, "list while reading", "gradient_rows", 4))
            continue
        read = sweep(rows, shape, gpu, "sweep, bits", "sweep_rows popular", 4)
        # Popular columns are fetched one by one before the row is read.
        more = rows * (SECTOR * POPULAR + shape.vocabulary / 8)
        kernels.append(replace(read, memory=read.memory + more))
        kernels += bits_to_lists(shape, gpu, rows, kept, tiled=False)
    return kernels


def _tiled_forward(shape: Shape, gpu: Gpu, kept: Kept) -> list[Kernel]:
    """Logits in registers, whose bits are candidates only."""
    few = wide_logits(shape.tokens, replace(shape, vocabulary=POPULAR), gpu)
    mask = shape.tokens * shape.vocabulary / 8
    return [
        small("floor", 1, 4 * shape.tokens * shape.width),
        *(replace(kernel, name="popular columns") for kernel in few),
        small("sum over popular columns", 10, 24 * shape.tokens * POPULAR),
        over_logits("forward", "linear_nll_forward emit", shape, gpu, mask),
        small("combine", 1, 24 * shape.tokens * SPLITS),
        *bits_to_lists(shape, gpu, shape.tokens, kept, tiled=True),
    ]


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
    Goal("exact", 3.4, None, lambda shape, gpu, _: exact(shape, gpu)),
    Goal("exact, 1 GiB", 3.4, None, lambda shape, gpu, _: exact(shape, gpu, 2**30)),
    Goal("forward only", 1.15, None, lambda shape, gpu, _: forward(shape, gpu)),
]
# What would change them. The second is built, for small budgets; the others are not.
_DENSER = Design(f"{DENSER} columns dense, dH and dW", dense=DENSER, dense_hidden=True)
DESIGNS = [
    BUILT,
    Design("tiled, as small budgets take", tiled=True),
    Design("listed by a second pass, no bits", second_pass=True),
    _DENSER,
]
