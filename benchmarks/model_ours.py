"""Our own calls as the model sees them, kernel by kernel, as they are built.

Figures of compiled kernels are those of ``model_static.json``.
"""

from __future__ import annotations

import math
from dataclasses import replace

from benchmarks.model_hardware import Gpu
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
from bft_kernels.plan import DEFAULT_ACCELERATOR_BUFFER_BYTES, plan_rows


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
    splits: int | None = None,
) -> Kernel:
    """A tiled pass over all logits.

    Row blocks go through the vocabulary 8 side by side, so ``weight`` comes from memory once for
    every 8 of them.

    Args:
        name: of the pass.
        kernel: that makes it.
        shape, gpu: of the call.
        memory: bytes beyond the operands.
        splits: parts of the vocabulary; None for those that the backend takes.
    """
    figures = compiled(gpu.target, kernel)
    row_blocks, built, _ = splits_for(shape, gpu, figures.tile)
    return triton_product(
        name,
        row_blocks * (splits or built),
        row_blocks * math.ceil(shape.vocabulary / figures.tile[1]),
        figures.tile,
        shape.width,
        figures.slots,
        figures.warps,
        figures.resident,
        gpu,
        memory + 2 * shape.width * (shape.tokens + shape.vocabulary * math.ceil(row_blocks / 8)),
    )


def issue_seconds(figures: Compiled, warps_in_all: float, instructions: float, gpu: Gpu) -> float:
    """To issue ``instructions`` in each of so many times a program's warps."""
    return warps_in_all * figures.warps * instructions / gpu.issue


def small(name: str, launches: int, memory: float = 0.0) -> Kernel:
    """Launches that move little."""
    return Kernel(name, memory=memory, launches=launches)


def prologue(shape: Shape) -> Kernel:
    """Labelled rows are listed by a sort of one bit; zeroed results."""
    return small("rows", 12, 100 * shape.tokens)


def forward_tiled(shape: Shape, gpu: Gpu) -> list[Kernel]:
    """Losses alone where the budget has no room for chunks."""
    return [
        prologue(shape),
        over_logits("forward", "linear_nll_forward", shape, gpu),
        small("combine", 1, 24 * shape.tokens * 9),
    ]


def logits_chunks(shape: Shape, budget: int) -> list[int]:
    """Rows of each chunk whose float32 logits fit ``budget``."""
    sizes = shape.tokens, shape.vocabulary, shape.width, 4, budget
    rows = plan_rows(*sizes, widen=False, scratch=0).chunk_rows
    full, rest = divmod(shape.tokens, rows)
    return [rows] * full + [rest] * (rest > 0)


def wide_logits(rows: int, shape: Shape, gpu: Gpu) -> list[Kernel]:
    """Float32 logits of a chunk, written where they stay; its rows of ``hidden`` in one piece."""
    return [
        small("rows of hidden", 1, 4 * rows * shape.width),
        product("logits", rows, shape.vocabulary, shape.width, gpu, out=4),
    ]


def sweep(rows: int, shape: Shape, gpu: Gpu, name: str, kernel: str, bytes_: int) -> Kernel:
    """A program a row over its logits, 2048 at a time."""
    figures = compiled(gpu.target, kernel)
    steps = rows * math.ceil(shape.vocabulary / figures.block["BLOCK"])
    moved = row_pass(name, rows, shape.vocabulary, bytes_, 0, gpu)
    return replace(moved, issue=issue_seconds(figures, steps, figures.outer, gpu))


def forward(shape: Shape, gpu: Gpu, budget: int = DEFAULT_ACCELERATOR_BUFFER_BYTES) -> list[Kernel]:
    """Losses alone, from the vendor's product into a buffer."""
    kernels = [prologue(shape)]
    for rows in logits_chunks(shape, budget):
        kernels += wide_logits(rows, shape, gpu)
        kernels.append(sweep(rows, shape, gpu, "sweep", "sweep_rows", 4))
    return kernels


def exact(
    shape: Shape,
    gpu: Gpu,
    budget: int = DEFAULT_ACCELERATOR_BUFFER_BYTES,
    *,
    trains_weight: bool = True,
) -> list[Kernel]:
    """The weighted loss, 3G: documents fit a chunk. Products write and add in place."""
    parameters = shape.vocabulary * shape.width
    kernels = [prologue(shape)]
    for i, rows in enumerate(logits_chunks(shape, budget)):
        kernels += wide_logits(rows, shape, gpu)
        kernels += [
            sweep(rows, shape, gpu, "sweep", "sweep_rows", 4),
            small("weights and loss of tokens", 3 + 8),
            sweep(rows, shape, gpu, "dy", "gradient_rows", 4 + 2),
            product("dH", rows, shape.width, shape.vocabulary, gpu, out=4),
            small("dH to bfloat16", 1, 6 * rows * shape.width),
        ]
        if trains_weight:
            dw = ("dW", shape.vocabulary, shape.width, rows)
            kernels.append(product(*dw, gpu, out=4, accumulates=i > 0))
    if trains_weight:
        kernels.append(elementwise("dW to bfloat16", parameters, 4, 2))
    return kernels


def exact_memory(shape: Shape, budget: int) -> float:
    """Bytes of ``exact`` beyond inputs, gradients and the float32 accumulator of ``dW``."""
    return 4 * shape.vocabulary * logits_chunks(shape, budget)[0]


def recomputed(
    shape: Shape, gpu: Gpu, rows: float, *, sampled: bool, trains_weight: bool
) -> list[Kernel]:
    """The backward from new logits for ``rows`` of the tokens.

    There is a program for each tile of all tokens; those past ``rows`` return at once.
    """
    operand, width, vocabulary = 2, shape.width, shape.vocabulary
    dy = compiled(gpu.target, "logit_gradient sampled" if sampled else "logit_gradient")
    dh, dw = (compiled(gpu.target, f"{name}_gradient") for name in ("hidden", "weight"))
    unit = max(dy.tile[1], dh.block["BLOCK_V"], dw.block["BLOCK_V"])
    step = DEFAULT_ACCELERATOR_BUFFER_BYTES // (shape.tokens * operand)
    step = min(vocabulary, max(1, step // unit) * unit)
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
        return [*kernels, small("rows without room", 8 + 3 * blocks)]

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
        memory = table + (4 if sampled else 2) * width * vocabulary  # the sampled one adds
        kernels.append(tiled("dW", dw, along, tile, rows, memory, 1))
    return [*kernels, small("launches", 8 + 3 * blocks)]


def certificate(shape: Shape, gpu: Gpu) -> list[Kernel]:
    """What its statistics add to the forward in chunks: the buffer is read once more."""
    chunks = logits_chunks(shape, DEFAULT_ACCELERATOR_BUFFER_BYTES)
    return [sweep(rows, shape, gpu, "certificate", "certificate_rows", 4) for rows in chunks]
