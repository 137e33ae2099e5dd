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
    wanted = min(vocabulary, 512)
    copied = width if copies else 0
    most_rows = (elements - 2 * width * wanted) // ((1 + scratch) * wanted + copied)
    block_rows = max(1, min(rows, most_rows))
    columns = (elements - copied * block_rows) // ((1 + scratch) * block_rows + 2 * width)
    return ColumnPlan(block_rows, max(1, min(vocabulary, columns)))
