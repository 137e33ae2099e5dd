"""Room for the lists of the sampled gradient. The host knows its size beforehand."""

import torch
from torch import Tensor


def capacity_for(rows: int, vocabulary: int, eps: float) -> int:
    """The number of entries that the lists of ``rows`` rows have room for.

    Text keeps 70, 190 and 480 entries a token for ``eps`` of 2^-8, 2^-10 and 2^-12. The bound of
    lse lets through twice as many, and there is room for 2.4 to 3.2 times as many. Flat
    distributions keep ``1 / eps``. Rows that find no room are computed again, tile by tile.
    """
    return rows * int(min(vocabulary, max(64, 8 * eps**-0.6) + 1))


def offsets_of(counts: Tensor, out: Tensor | None = None) -> Tensor:
    """``[N + 1]``: where the entries of each row begin. Rows that end past the room list none.

    If ``out`` is given, it is filled in; it must begin with 0.
    """
    out = counts.new_zeros(counts.numel() + 1) if out is None else out
    torch.cumsum(counts, 0, out=out[1:])
    return out


def overflowed(offsets: Tensor, capacity: int) -> Tensor:
    """``[N]`` bool: rows whose entries found no room."""
    return (offsets[1:] > capacity) & (offsets.diff() > 0)
