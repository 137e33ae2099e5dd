"""Our own calls as the model sees them, kernel by kernel, as they are built.

Sizes come from ``bft_kernels`` where a constant has a name there, figures of compiled kernels from
``model_static.json``, entries kept from ``kept_entries.json``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.model_entries import DENSE, FLOOR, SPLITS, Kept
from benchmarks.model_hardware import LATENCY, Gpu
from benchmarks.model_kernels import (
    Kernel,
    elementwise,
    empty_programs,
    product,
    row_pass,
    triton_product,
)
from benchmarks.model_static import Compiled, compiled
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
    triton: float | None = None  # rate of the forward's loop, of the vendor's
    overlapped: bool = False  # gathers never wait: bytes and instructions alone count


BUILT = Design("as built")


def splits_for(shape: Shape, gpu: Gpu, tile: tuple[int, int]) -> tuple[int, int, int]:
    """Row blocks, parts of the vocabulary and tiles of each, as ``Inputs.splits`` has them."""
    row_blocks = math.ceil(shape.tokens / tile[0])
    tiles = math.ceil(shape.vocabulary / tile[1])
    wanted = max(1, min(tiles, math.ceil(4 * gpu.processors / row_blocks)))
    each = math.ceil(tiles / wanted)
    return row_blocks, math.ceil(tiles / each), each


def over_logits(
    name: str,
    kernel: str,
    shape: Shape,
    gpu: Gpu,
    memory: float = 0.0,
    design: Design = BUILT,
) -> Kernel:
    """A tiled pass over all logits; ``memory`` beyond the operands, in bytes.

    Row blocks go through the vocabulary 8 side by side, so ``weight`` comes from memory once for
    every 8 of them.
    """
    figures = compiled(gpu.target, kernel)
    row_blocks, splits, _ = splits_for(shape, gpu, figures.tile)
    made = triton_product(
        name,
        row_blocks * (design.splits or splits),
        row_blocks * math.ceil(shape.vocabulary / figures.tile[1]),
        figures.tile,
        shape.width,
        figures.slots,
        figures.warps,
        figures.resident,
        gpu,
        memory + 2 * shape.width * (shape.tokens + shape.vocabulary * math.ceil(row_blocks / 8)),
    )
    if design.triton is None:
        return made
    return replace(made, tensor=made.tensor * gpu.triton / design.triton)


def issue_seconds(figures: Compiled, warps_in_all: float, instructions: float, gpu: Gpu) -> float:
    """To issue ``instructions`` in each of so many times a program's warps."""
    return warps_in_all * figures.warps * instructions / gpu.issue


def _small(name: str, launches: int, memory: float = 0.0) -> Kernel:
    return Kernel(name, memory=memory, launches=launches)


def prologue(shape: Shape) -> Kernel:
    """Labelled rows are listed by a sort of one bit; zeroed results."""
    return _small("rows", 12, 100 * shape.tokens)


def forward(shape: Shape, gpu: Gpu) -> list[Kernel]:
    """Losses alone, tiled."""
    return [
        prologue(shape),
        over_logits("forward", "linear_nll_forward", shape, gpu),
        _small("combine", 1, 24 * shape.tokens * 9),
    ]


def logits_chunks(shape: Shape, budget: int) -> list[int]:
    """Rows of each chunk whose float32 logits fit ``budget``."""
    rows = max(1, min(shape.tokens, budget // (4 * shape.vocabulary)))
    full, rest = divmod(shape.tokens, rows)
    return [rows] * full + [rest] * (rest > 0)


def _wide_logits(rows: int, shape: Shape, gpu: Gpu, *, copied: bool) -> list[Kernel]:
    """Float32 logits of a chunk; copied: into their buffer, from where the product left them."""
    kernels = [product("logits", rows, shape.vocabulary, shape.width, gpu, out=4)]
    if copied:
        kernels.append(row_pass("logits copied", rows, shape.vocabulary, 4, 4, gpu))
    return kernels


def _sweep(rows: int, shape: Shape, gpu: Gpu, name: str, kernel: str, bytes_: int) -> Kernel:
    """A program a row over its logits, 4096 at a time."""
    figures = compiled(gpu.target, kernel)
    steps = rows * math.ceil(shape.vocabulary / figures.block["BLOCK"])
    moved = row_pass(name, rows, shape.vocabulary, bytes_, 0, gpu)
    return replace(moved, issue=issue_seconds(figures, steps, figures.outer, gpu))


def forward_chunked(shape: Shape, gpu: Gpu, budget: int = 2**29) -> list[Kernel]:
    """Losses alone, from the vendor's product into a buffer. Not built as a forward of its own."""
    kernels = [prologue(shape)]
    for rows in logits_chunks(shape, budget):
        kernels += _wide_logits(rows, shape, gpu, copied=False)
        kernels.append(_sweep(rows, shape, gpu, "sweep", "sweep_rows", 4))
    return kernels


def exact(
    shape: Shape,
    gpu: Gpu,
    budget: int = DEFAULT_ACCELERATOR_BUFFER_BYTES,
    *,
    in_place: bool = False,
    trains_weight: bool = True,
) -> list[Kernel]:
    """The weighted loss, 3G: documents fit a chunk.

    As built, a product into a buffer of another type makes a result of its own first, which is
    copied (logits) or added (``dW``); ``in_place``: the product writes and adds itself.
    """
    parameters = shape.vocabulary * shape.width
    kernels = [prologue(shape)]
    for rows in logits_chunks(shape, budget):
        kernels += _wide_logits(rows, shape, gpu, copied=not in_place)
        kernels += [
            _sweep(rows, shape, gpu, "sweep", "sweep_rows", 4),
            _sweep(rows, shape, gpu, "dy", "gradient_rows", 4 + 2),
            product("dH", rows, shape.width, shape.vocabulary, gpu, out=4),
            _small("weights of tokens", 30),
        ]
        if trains_weight:
            dw = ("dW", shape.vocabulary, shape.width, rows)
            kernels.append(product(*dw, gpu, out=4, accumulates=in_place))
            if not in_place:
                kernels.append(elementwise("dW added", parameters, 8, 4))
    if trains_weight:
        kernels.append(elementwise("dW zeroed", parameters, 0, 4))
        kernels.append(elementwise("dW to bfloat16", parameters, 4, 2))
    return kernels


def exact_memory(shape: Shape, budget: int, *, in_place: bool) -> float:
    """Bytes of ``exact`` beyond inputs, gradients and the float32 accumulator of ``dW``.

    The buffer, and as built the larger of what is copied to it and what is added to ``dW``.
    """
    rows = logits_chunks(shape, budget)[0]
    return 4 * shape.vocabulary * (rows + (0 if in_place else max(rows, shape.width)))


def recomputed(
    shape: Shape, gpu: Gpu, rows: float, *, sampled: bool, trains_weight: bool
) -> list[Kernel]:
    """The exact backward for ``rows`` of the tokens; the other programs return at once."""
    operand, width, vocabulary = 2, shape.width, shape.vocabulary
    dy = compiled(gpu.target, "logit_gradient sampled" if sampled else "logit_gradient")
    dh, dw = (compiled(gpu.target, f"{name}_gradient") for name in ("hidden", "weight"))
    step = DEFAULT_ACCELERATOR_BUFFER_BYTES // (shape.tokens * operand)
    step = min(vocabulary, max(1, step // dy.tile[1]) * dy.tile[1])
    blocks = math.ceil(vocabulary / step)
    row_blocks = math.ceil(shape.tokens / dy.tile[0])
    busy = math.ceil(rows / dy.tile[0])
    columns = math.ceil(vocabulary / dy.tile[1])
    across = math.ceil(width / dh.block["BLOCK_D"])
    idle = row_blocks - busy
    kernels = [
        empty_programs("dy, empty programs", idle * columns, dy.resident, gpu),
        empty_programs("dH, empty programs", idle * across * blocks, dh.resident, gpu),
    ]
    along = math.ceil(vocabulary / dw.block["BLOCK_V"]) * math.ceil(width / dw.block["BLOCK_D"])
    if not busy:
        if trains_weight:
            kernels.append(empty_programs("dW, empty programs", along, dw.resident, gpu))
        return [*kernels, _small("rows without room", 8 + 3 * blocks)]

    def tiled(
        name: str,
        figures: Compiled,
        tiles: int,
        block: tuple[int, int],
        k: float,
        memory: float,
        steps: float,
    ) -> Kernel:
        # Outside the loop only once, whatever its length.
        return triton_product(
            name,
            tiles,
            tiles,
            block,
            round(k),
            figures.slots * steps,
            figures.warps,
            figures.resident,
            gpu,
            memory,
        )

    table = rows * vocabulary * operand
    kernels += [
        tiled("dy", dy, busy * columns, dy.tile, width, table + 2 * width * vocabulary, 1),
        tiled(
            "dH",
            dh,
            busy * across * blocks,
            (dh.block["BLOCK_N"], dh.block["BLOCK_D"]),
            vocabulary / blocks,
            table + 2 * width * vocabulary + 8 * rows * width * (blocks - 1),
            1,
        ),
    ]
    if trains_weight:
        tile = (dw.block["BLOCK_V"], dw.block["BLOCK_D"])
        memory = table + 4 * width * vocabulary
        kernels.append(tiled("dW", dw, along, tile, rows, memory, 1))
    return [*kernels, _small("launches", 8 + 3 * blocks)]


def lists(shape: Shape, gpu: Gpu, listed: float) -> list[Kernel]:
    """Bits become columns: a pass that counts and one that writes, 1024 words at a time."""
    count, listing = (compiled(gpu.target, f"{name}_entries") for name in ("count", "list"))
    words = shape.vocabulary / 32
    steps = shape.tokens * math.ceil(words / count.block["BLOCK"])
    mask = 4 * words * shape.tokens
    each = listing.outer - listing.inner + 32 * listing.inner
    return [
        Kernel("count", issue=issue_seconds(count, steps, count.outer, gpu), memory=mask),
        _small("offsets", 6, 40 * shape.tokens),
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
        _small("sort by column", 45, SORT_BYTES * room * shape.tokens),
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
        _small("dense table", 14, DENSE * shape.tokens * 28 + 4 * shape.tokens * width),
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
    kernels = [prologue(shape), _small("floor", 1, 4 * shape.tokens * shape.width)]
    if design.floor:
        part = replace(shape, vocabulary=math.ceil(shape.vocabulary * FLOOR))
        kernels.append(over_logits("sum over a part", "linear_nll_forward", part, gpu))
    if design.chunked:
        for rows in logits_chunks(shape, DEFAULT_ACCELERATOR_BUFFER_BYTES):
            kernels += _wide_logits(rows, shape, gpu, copied=False)
            kernels.append(_sweep(rows, shape, gpu, "sweep", "sweep_rows", 4))
            kernels.append(_sweep(rows, shape, gpu, "list while reading", "gradient_rows", 4))
    else:
        mask = shape.tokens * shape.vocabulary / 8
        name = "linear_nll_forward emit"
        kernels.append(over_logits("forward", name, shape, gpu, mask, design))
        kernels.append(_small("combine", 1, 24 * shape.tokens * splits))
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


def certificate(shape: Shape, gpu: Gpu) -> list[Kernel]:
    """A product more, when its statistics are asked for."""
    return [over_logits("certificate", "certificate", shape, gpu)]


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
_FLOOR = Design("sum over V / 32 known, lists with room", floor=True, room=True)
_FILLED = replace(_FLOOR, name="the same, 2 splits", splits=2)
_CHUNKED = Design("vendor's product, lse known to the list", chunked=True)
DESIGNS = [
    BUILT,
    Design("lists with room", room=True),
    Design("2 splits, lists with room", splits=2, room=True),
    _FLOOR,
    _FILLED,
    replace(_FILLED, name="the same, gathers overlapped", overlapped=True),
    _CHUNKED,
    replace(_CHUNKED, name="the same, then gathers overlapped", overlapped=True),
]
