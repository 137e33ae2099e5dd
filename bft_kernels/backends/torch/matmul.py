"""Matrix products in blocks, accumulated in float32 (float64 for float64) whatever the inputs.

On a CPU half-precision operands are widened block by block, because its half-precision products are
slow and round their output; on an accelerator they stay narrow and the product's output is wide.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def gemm_dtype(operand: torch.dtype, accumulator: torch.dtype, device_type: str) -> torch.dtype:
    """The type the operands have when they enter the vendor's product."""
    return accumulator if device_type == "cpu" else operand


def as_operand(x: Tensor, operand: torch.dtype, accumulator: torch.dtype) -> Tensor:
    """``x`` rounded to ``operand`` and stored in the product's type. No copy where none is due."""
    return x.to(operand).to(gemm_dtype(operand, accumulator, x.device.type))


def converts(x: Tensor, operand: torch.dtype, accumulator: torch.dtype) -> bool:
    """Whether ``x`` has to be copied to another type, in blocks, before a product."""
    wanted = gemm_dtype(operand, accumulator, x.device.type)
    return not x.dtype == operand == wanted


def multiply(a: Tensor, b: Tensor, accumulator: torch.dtype, out: Tensor | None = None) -> Tensor:
    """``a @ b`` in the accumulator's type."""
    if a.dtype == accumulator:
        return torch.mm(a, b, out=out)
    product = torch.mm(a, b, out_dtype=accumulator)
    return product if out is None else out.copy_(product)


class Products:
    """The three products of the loss for one ``weight [V, D]`` and a block size.

    Args:
        weight: ``[V, D]``.
        operand: the type products are rounded to.
        accumulator: float32 or float64.
        block: rows of ``weight`` converted at a time, where it has to be converted.
    """

    def __init__(
        self, weight: Tensor, operand: torch.dtype, accumulator: torch.dtype, block: int
    ) -> None:
        self.weight = weight
        self.operand = operand
        self.accumulator = accumulator
        self.block = block if self.converts else weight.shape[0]

    @property
    def converts(self) -> bool:
        """Whether blocks of ``weight`` are copied to another type before a product."""
        return converts(self.weight, self.operand, self.accumulator)

    def rows(self, hidden: Tensor) -> Tensor:
        """Rows of ``hidden`` as an operand."""
        return as_operand(hidden, self.operand, self.accumulator)

    def columns(self, first: int, stop: int) -> Tensor:
        """``weight[first:stop]`` as an operand."""
        return as_operand(self.weight[first:stop], self.operand, self.accumulator)

    def blocks(self) -> Iterator[tuple[int, int]]:
        vocabulary = self.weight.shape[0]
        for first in range(0, vocabulary, self.block):
            yield first, min(first + self.block, vocabulary)

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """``out [n, V] = hidden [n, D] @ weight.T``."""
        for first, stop in self.blocks():
            multiply(hidden, self.columns(first, stop).T, self.accumulator, out=out[:, first:stop])
        return out

    def hidden_gradient(self, dy: Tensor) -> Tensor:
        """``dy [n, V] @ weight -> [n, D]`` in the accumulator's type."""
        total: Tensor | None = None
        for first, stop in self.blocks():
            weight = self.columns(first, stop)
            part = multiply(dy[:, first:stop].to(weight.dtype), weight, self.accumulator)
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def add_weight_gradient(self, dy: Tensor, hidden: Tensor, out: Tensor) -> None:
        """``out [V, D] += dy.T @ hidden`` for ``dy [n, V]``, ``out`` in the accumulator's type."""
        if hidden.dtype == out.dtype:
            out.addmm_(dy.T, hidden)
            return
        for first, stop in self.blocks():
            part = dy[:, first:stop].to(hidden.dtype)
            out[first:stop].add_(multiply(part.T, hidden, self.accumulator))
