"""Memory for logits that wait for their weights. It is kept from one call to the next.

The system clears each page of fresh memory before its first use. For 200 MiB that takes as long as
a quarter of a GEMM. The process keeps one block, as large as the largest call needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

_kept: list[Tensor] = []  # at most one, except while calls run side by side


def borrow(count: int) -> Tensor:
    """Float32 ``[count]`` or longer, of any values, for this caller until it is given back."""
    space = _kept.pop() if _kept else torch.empty(0, dtype=torch.float32, device="cpu")
    if space.numel() >= count:
        return space
    del space  # freed before its successor is made
    with torch.inference_mode(mode=False):  # so that any later call may write to it
        return torch.empty(count, dtype=torch.float32, device="cpu")


def give_back(space: Tensor) -> None:
    """Keeps a borrowed block for the next call, if no other is kept."""
    if not _kept:
        _kept.append(space)


def empty_cache() -> None:
    """Frees the memory that the ``cpu`` backend keeps between calls.

    The exact weighted loss keeps its buffer of logits (at most ``max_buffer_bytes``), just as
    ``torch.cuda`` keeps freed memory. The next call that needs a buffer makes a new one.
    """
    _kept.clear()
