"""From one byte budget to block sizes.

The budget covers every temporary of the ``torch`` backend that grows with ``V`` or with a block
of it: the block of logits, its scratch, widened copies of ``weight`` and a block of ``dW``. It does
not cover ``[N]`` vectors, the sparse entries of ``gradient="sampled"``, nor the gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_BUFFER_BYTES = {"cpu": 64 * 2**20}
DEFAULT_ACCELERATOR_BUFFER_BYTES = 512 * 2**20

# Elementwise passes run over tiles of about this many logits, so that on a CPU a tile and its
# scratch stay in the second-level cache or near it between passes.
TILE_ELEMENTS = 2**18


def default_buffer_bytes(device_type: str) -> int:
    """64 MiB on a CPU, 512 MiB on an accelerator."""
    return DEFAULT_BUFFER_BYTES.get(device_type, DEFAULT_ACCELERATOR_BUFFER_BYTES)


# What a block of logits of the cpu backend may take of the caches, and how many columns of the
# vocabulary are best for the vendor's product; see docs/performance.md.
CPU_BLOCK_BYTES = 2 * 2**20
CPU_BLOCK_COLUMNS = 512
CPU_LEAST_CHUNK = 128


@dataclass(frozen=True)
class RowPlan:
    """Blocks of whole rows of logits: ``[chunk_rows, V]``, swept in tiles of ``tile_rows``."""

    chunk_rows: int
    tile_rows: int
    weight_rows: int  # rows of ``weight`` widened at a time; V where nothing is widened


@dataclass(frozen=True)
class ColumnPlan:
    """Blocks of the vocabulary: ``[rows, columns]`` logits of every row against few columns."""

    rows: int
    columns: int


def plan_rows(
    rows: int, vocabulary: int, width: int, itemsize: int, budget: int, *, widen: bool, scratch: int
) -> RowPlan:
    """Block sizes for passes that need whole rows.

    Args:
        rows, vocabulary, width: ``N``, ``V`` and ``D``.
        itemsize: bytes of an accumulator element.
        budget: bytes for everything together. At least one row is always taken, whatever it is.
        widen: whether blocks of ``weight`` are copied to another type first (a quarter of the
            budget).
        scratch: how many tile-sized temporaries the sweep holds.
    """
    weight_rows = vocabulary
    if widen:
        weight_rows = max(1, min(vocabulary, budget // 4 // (width * itemsize)))
        budget -= budget // 4
    row_bytes = vocabulary * itemsize
    tile_rows = max(1, min(rows, TILE_ELEMENTS // vocabulary))
    # A tile's temporaries come out of the same budget; small budgets get one-row tiles.
    while tile_rows > 1 and tile_rows * scratch * row_bytes > budget // 2:
        tile_rows //= 2
    chunk_rows = (budget - tile_rows * scratch * row_bytes) // row_bytes
    chunk_rows = max(1, min(rows, chunk_rows))
    return RowPlan(chunk_rows, min(tile_rows, chunk_rows), weight_rows)


def plan_columns(
    rows: int,
    vocabulary: int,
    width: int,
    itemsize: int,
    budget: int,
    *,
    copies: bool,
    scratch: int,
) -> ColumnPlan:
    """Block sizes for the recomputing backward, whose ``lse`` is known.

    A block costs ``(1 + scratch) * rows * columns`` logits, a widened block of ``weight``, one of
    ``dW`` and, with ``copies``, one of ``hidden``. All rows against a few columns is best for the
    products, as long as the block keeps some hundreds of columns; beyond that rows are split too.
    """
    elements = max(1, budget // itemsize)
    copied = width if copies else 0
    block_rows, wanted = 0, min(vocabulary, 512)
    while True:
        block_rows = (elements - 2 * width * wanted) // ((1 + scratch) * wanted + copied)
        # A block of one row against many columns is no product: as many rows as columns.
        if block_rows >= min(rows, wanted) or wanted == 1:
            break
        wanted //= 2
    block_rows = max(1, min(rows, block_rows))
    columns = (elements - copied * block_rows) // ((1 + scratch) * block_rows + 2 * width)
    return ColumnPlan(block_rows, max(1, min(vocabulary, columns)))


@dataclass(frozen=True)
class CpuPlan:
    """Blocks of the ``cpu`` backend: ``[rows, columns]`` float32 logits at a time."""

    rows: int
    columns: int
    whole: bool  # whether the operand's rows are copied all at once, where they have to be copied


def plan_cpu_blocks(
    rows: int,
    vocabulary: int,
    width: int,
    budget: int,
    *,
    widens: bool,
    copies: bool,
    products: int = 1,
    narrow_gradient: bool = False,
) -> CpuPlan:
    """Block sizes for passes over all rows, vocabulary blocks outside and row blocks inside.

    A block of ``weight`` should stay in cache over all rows, and a block of logits from its product
    to its sweep. Both want few columns; the products' speed and, with a gradient, the passes over
    ``dH`` want many.

    Args:
        rows, vocabulary, width: ``N``, ``V`` and ``D``.
        budget: bytes for the block of logits and for the copies below.
        widens: whether blocks of ``weight`` are copied to float32 first.
        copies: whether rows of ``hidden`` are copied first.
        products: how many products use a block of logits.
        narrow_gradient: whether blocks of ``dW`` are accumulated beside it, to be rounded once.
    """
    elements = budget // 4
    column_copies = int(width * (1.5 * widens + 2 * narrow_gradient))
    columns = min(vocabulary, CPU_BLOCK_COLUMNS * products)
    if column_copies:
        columns = max(1, min(columns, elements // 2 // column_copies))
        elements -= columns * column_copies
    whole = copies and rows * width <= elements // 2
    if whole:
        elements -= rows * width
    row_copies = 2 * width if copies and not whole else 0
    block = min(elements, CPU_BLOCK_BYTES * products // 4)
    columns = max(1, min(columns, block - row_copies))
    return CpuPlan(max(1, min(rows, block // (columns + row_copies))), columns, whole)


def plan_cpu_chunk(rows: int, vocabulary: int, width: int, budget: int, plan: CpuPlan) -> int:
    """Rows of whole logits that the ``cpu`` backend's 3G path takes at a time; 0: not worth it.

    A chunk of ``c`` rows saves one product, ``2 c V D`` flops, and costs a pass over ``dW``,
    ``8 V D`` bytes: below about a hundred rows the pass takes longer on a CPU.

    Args:
        rows, vocabulary, width: ``N``, ``V`` and ``D``.
        budget: bytes for the chunk, its rows of ``dH`` and a widened block of ``weight``.
        plan: of the blocks.
    """
    chunk = (budget // 4 - 2 * plan.columns * width) // (vocabulary + 2 * width)
    chunk = min(rows, chunk)
    return chunk if chunk >= min(rows, CPU_LEAST_CHUNK) else 0
