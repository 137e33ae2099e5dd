"""From one byte budget to block sizes of passes over rows or columns of logits.

The budget covers every temporary that grows with ``V`` or with a block of it: blocks of logits,
their scratch, widened copies of ``weight`` and a block of ``dW``. It does not cover ``[N]``
vectors, the sparse entries of ``gradient="sampled"``, nor the gradients.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

CPU_BUFFER_BYTES = 64 * 2**20
# 512 MiB of logits, and a bit for each.
ACCELERATOR_BUFFER_BYTES = 528 * 2**20
# Of a device with more than LARGE_MEMORY_BYTES in all, whatever of it is free: the exact ``dW``
# goes through float32 memory once a chunk, and a larger budget makes fewer chunks.
LARGE_ACCELERATOR_BUFFER_BYTES = 2 * 2**30
LARGE_MEMORY_BYTES = 40 * 2**30

# Elementwise passes run over tiles of about this many logits, so that on a CPU a tile and its
# scratch stay in the second-level cache or near it between passes.
TILE_ELEMENTS = 2**18


@functools.cache
def default_buffer_bytes(device: torch.device) -> int:
    """64 MiB on a CPU; on an accelerator 528 MiB, or 2 GiB where it has more than 40 GiB."""
    if device.type == "cpu":
        return CPU_BUFFER_BYTES
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        if total > LARGE_MEMORY_BYTES:
            return LARGE_ACCELERATOR_BUFFER_BYTES
    return ACCELERATOR_BUFFER_BYTES


# A GPU's products take so many rows a tile, filled or not: chunks of many rows are a multiple.
PRODUCT_ROWS, MANY_ROWS = 128, 512


@dataclass(frozen=True)
class RowPlan:
    """Blocks of whole rows of logits: ``[chunk_rows, V]``, swept in tiles of ``tile_rows``."""

    chunk_rows: int
    tile_rows: int
    weight_rows: int  # rows of ``weight`` widened at a time; V where nothing is widened


# The vendor's product and a pass over its result are faster than a product whose tiles never leave
# registers, if so many rows are multiplied at a time; see docs/dev/gpu-model.md.
CHUNK_ROWS = 256


def takes_chunks(rows: int, vocabulary: int, budget: int) -> bool:
    """Whether the ``triton`` backend's forward keeps logits in a buffer, chunk by chunk.

    A logit takes 4 bytes, and for the sampled gradient a bit.
    """
    return min(rows, CHUNK_ROWS) * vocabulary * 33 // 8 <= budget


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
    if chunk_rows >= MANY_ROWS:
        chunk_rows -= chunk_rows % PRODUCT_ROWS
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
