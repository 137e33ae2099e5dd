"""What passes in tiles share: the parts of a forward, and the blocks of a recomputing backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bft_kernels.backends.common.gemm import scale_for
from bft_kernels.backends.common.inputs import Inputs
from bft_kernels.backends.common.rows import KnownRows
from bft_kernels.results import Gradients


def candidate_masks(inputs: Inputs, unit: int) -> Iterator[tuple[int, Tensor]]:
    """Rows that fit the budget, ``unit`` or more: the first, and room for a bit for each entry.

    The room, ``[rows, ceil(V / 32)]`` int32, is the same memory for all of them.
    """
    count, vocabulary, _ = inputs.shape
    words = -(-vocabulary // 32)
    step = unit * max(1, inputs.call.buffer_bytes // (4 * words) // unit)
    size = min(step, count), words
    mask = torch.empty(size, dtype=torch.int32, device=inputs.hidden.device)
    for first in range(0, count, step):
        yield first, mask[: count - first]


class Recomputation(NamedTuple):
    """The gradient ``dy`` of logits, a block of columns at a time, as the byte budget allows."""

    vocabulary: int
    known: KnownRows  # of all rows; ``grad`` is multiplied by ``scale``
    scale: Tensor | None  # [], that products are divided by; see `scale_for`
    step: int  # columns of a block, of which the last may have fewer
    dy: Tensor  # [N * step], in the type of the operands
    sums: Tensor  # [N * D] float32, dH of the blocks before; [0] if there is one block

    @staticmethod
    def of(inputs: Inputs, known: KnownRows, into: Gradients, unit: int) -> Recomputation:
        """Blocks of a multiple of ``unit`` columns."""
        count, vocabulary, width = inputs.shape
        call, operand, device = inputs.call, inputs.call.operand, inputs.hidden.device
        blocks = call.buffer_bytes // max(1, count * operand.itemsize) // unit
        step = min(-(-vocabulary // unit), max(1, blocks)) * unit
        several = into.hidden is not None and step < vocabulary
        dy = torch.empty(count * step, dtype=operand, device=device)
        sums = torch.empty(count * width * several, dtype=torch.float32, device=device)
        scale = None
        if operand == torch.float16:
            grad, lse = inputs.rows.mask(known.grad), inputs.rows.mask(known.lse)
            scale = scale_for(grad, lse, call.settings.temperature, call.settings.z_loss)
            known = known._replace(grad=known.grad * scale)
        return Recomputation(vocabulary, known, scale, step, dy, sums)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """The first column of each block, and how many it has."""
        for first in range(0, self.vocabulary, self.step):
            yield first, min(self.step, self.vocabulary - first)
