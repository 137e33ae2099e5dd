"""Room for the lists of the sampled gradient: known to the host, whatever the device finds."""

from __future__ import annotations

import torch
from torch import Tensor


def capacity_for(rows: int, vocabulary: int, eps: float) -> int:
    """Entries that lists of ``rows`` rows have room for.

    Text keeps 70, 190 and 480 entries a token for ``eps`` of 2^-8, 2^-10 and 2^-12, and the bound
    of lse lets through twice as many: there is room for three times as many. Flat distributions
    keep ``1 / eps``. Rows that find no room are computed again, tile by tile.
    """
    return rows * int(min(vocabulary, max(64, 8 * eps**-0.6) + 1))


def offsets_of(counts: Tensor) -> Tensor:
    """``[N + 1]``: where the entries of each row begin. Rows that end past the room have none."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def overflowed(offsets: Tensor, capacity: int) -> Tensor:
    """``[N]`` bool: rows whose entries found no room."""
    return (offsets[1:] > capacity) & (offsets.diff() > 0)
