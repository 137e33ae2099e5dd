"""Which documents are taken together, and where they lie among the rows that are computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bft_kernels.backends.common.rows import LabelledRows
from bft_kernels.results import Documents


class Piece(NamedTuple):
    """Rows ``first:stop``, taken together."""

    first: int
    stop: int
    # Of its documents, from 0, beside the rows; None for weights local to a token.
    cu_seqlens: Tensor | None = None  # [s + 1]
    documents: slice = slice(0)  # which of RowDocuments they are


class RowDocuments(NamedTuple):
    """Documents over the rows that are computed; on a CPU those that have any."""

    cu_seqlens: Tensor  # [s + 1] int64
    bounds: list[int]  # the same on the host
    which: Tensor | None  # [s] int64, which of the caller's documents they are; None: all of them


def in_rows(rows: LabelledRows, documents: Documents) -> RowDocuments:
    """The caller's documents over the rows that are computed."""
    if rows.masked:
        return RowDocuments(documents.cu_seqlens, documents.bounds, None)
    cu_seqlens = documents.cu_seqlens
    if rows.index is not None:
        cu_seqlens = torch.searchsorted(rows.index, cu_seqlens)
    filled = cu_seqlens.diff().nonzero().squeeze(1)
    cu_seqlens = torch.cat([cu_seqlens[:1], cu_seqlens[filled + 1]])
    return RowDocuments(cu_seqlens, cu_seqlens.tolist(), filled)


def pieces(rows: LabelledRows, documents: RowDocuments | None, chunk: int) -> Iterator[Piece]:
    """Pieces that fit the chunk, but for documents that do not.

    Weights local to a token need no documents: any rows go together.
    """
    if documents is None:
        for first in range(0, rows.size, chunk):
            yield Piece(first, min(first + chunk, rows.size))
        return
    cu_seqlens, bounds, _ = documents
    begin = 0
    for place in range(1, len(bounds) + 1):
        last = place == len(bounds)
        if bounds[place - 1] > bounds[begin] and (last or bounds[place] - bounds[begin] > chunk):
            first, stop = bounds[begin], bounds[place - 1]
            own = cu_seqlens[begin:place] - first
            yield Piece(first, stop, own, slice(begin, place - 1))
            begin = place - 1
