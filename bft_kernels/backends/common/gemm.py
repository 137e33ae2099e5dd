"""GEMMs in blocks, accumulated in float32 (float64 for float64) whatever the inputs.

On a CPU, half-precision GEMMs are slow and round their output, so half-precision operands are
widened block by block. On an accelerator they stay narrow, and the GEMM's output is float32.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from bft_kernels.settings import Settings


def gemm_dtype(operand: torch.dtype, acc_dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The type the operands have when they enter the vendor's GEMM."""
    return acc_dtype if device_type == "cpu" else operand


def as_operand(x: Tensor, operand: torch.dtype, acc_dtype: torch.dtype) -> Tensor:
    """``x`` rounded to ``operand`` and stored in the GEMM's type; a copy only if needed."""
    return x.to(operand).to(gemm_dtype(operand, acc_dtype, x.device.type))


def converts(x: Tensor, operand: torch.dtype, acc_dtype: torch.dtype) -> bool:
    """Whether ``x`` has to be copied to another type, in blocks, before a GEMM."""
    wanted = gemm_dtype(operand, acc_dtype, x.device.type)
    return not x.dtype == operand == wanted


def multiply(a: Tensor, b: Tensor, acc_dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """``a @ b`` in acc_dtype."""
    if a.dtype == acc_dtype:
        return torch.mm(a, b, out=out)
    if out is None:
        return torch.mm(a, b, out_dtype=acc_dtype)
    return torch.mm(a, b, out_dtype=acc_dtype, out=out)


# Before torch 2.10, addmm adds only to a tensor of the operands' type.
_ADDS_WIDE = torch.torch_version.TorchVersion(torch.__version__) >= "2.10"
# A product that is made before it is added has at most this many elements, which fit the
# second-level cache of a GPU.
_PRODUCT_ELEMENTS = 2**22


def add_product(
    out: Tensor, a: Tensor, b: Tensor, factor: Tensor | None = None, *, adds: bool = True
) -> None:
    """``out += factor * (a @ b)``, for a ``factor []`` that only the device knows.

    Without ``adds`` the product is written, whatever ``out`` holds.
    """
    if not adds:
        multiply(a, b, out.dtype, out=out)
        if factor is not None:
            out.mul_(factor)
    elif factor is None and a.dtype == out.dtype:
        out.addmm_(a, b)
    elif factor is None and _ADDS_WIDE:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        step = max(1, _PRODUCT_ELEMENTS // b.shape[1])
        for first in range(0, out.shape[0], step):
            product = multiply(a[first : first + step], b, out.dtype)
            out[first : first + step].add_(product if factor is None else product.mul_(factor))


def scale_for(upstream: Tensor, lse: Tensor, temperature: float, z_loss: float) -> Tensor:
    """``[]`` float32: the power of two that brings a bound of ``|dy|`` to between 128 and 256.

    The gradients of a mean are too small for float16. So they are multiplied by this power before
    they are rounded, and their products are divided by it. The host does not learn it.

    Args:
        upstream: ``[n]``, the factor of the gradient of each row's loss.
        lse: ``[n]``, read only with ``z_loss``.
    """
    if upstream.numel() == 0:
        return upstream.new_ones((), dtype=torch.float32)
    bound = upstream.abs().amax().float() / temperature
    if z_loss:
        bound = bound * (1 + 2 * abs(z_loss) * lse.abs().amax())
    fraction, exponent = torch.frexp(bound)  # fraction in [0.5, 1)
    usable = torch.isfinite(fraction) & (fraction != 0)
    exponent = torch.where(usable, 8 - exponent, 0).clamp(-100, 100)
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)  # the bits of 2^exponent


class Gemm:
    """The three GEMMs of the loss for one ``weight [V, D]`` and a block size.

    Args:
        weight: ``[V, D]``.
        operand: the type to which the operands of GEMMs are rounded.
        acc_dtype: float32 or float64.
        block: rows of ``weight`` that are converted at a time, if it has to be converted.
        adapter: ``[V, r]`` or None. Rows of ``hidden`` are ``[h | a]`` then, and two products make
            logits, ``h @ weight.T + a @ adapter.T``. It is converted as a whole.
    """

    def __init__(
        self,
        weight: Tensor,
        operand: torch.dtype,
        acc_dtype: torch.dtype,
        block: int,
        adapter: Tensor | None = None,
    ) -> None:
        self.weight, self.operand, self.acc_dtype = weight, operand, acc_dtype
        # Whether blocks of weight are copied to another type before a GEMM.
        self.converts = converts(weight, operand, acc_dtype)
        self.block = block if self.converts else weight.shape[0]
        self.width = weight.shape[1]
        self.adapter = None if adapter is None else as_operand(adapter, operand, acc_dtype)

    def rows(self, hidden: Tensor) -> Tensor:
        """Rows of ``hidden`` as an operand."""
        return as_operand(hidden, self.operand, self.acc_dtype)

    def columns(self, first: int, stop: int) -> Tensor:
        """``weight[first:stop]`` as an operand."""
        return as_operand(self.weight[first:stop], self.operand, self.acc_dtype)

    def _blocks(self, step: int) -> Iterator[tuple[int, int]]:
        vocabulary = self.weight.shape[0]
        for first in range(0, vocabulary, step):
            yield first, min(first + step, vocabulary)

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """``out [n, V] = hidden [n, D] @ weight.T``, and the adapter's product."""
        if not self.converts and self.adapter is None:
            return multiply(hidden, self.weight.T, self.acc_dtype, out=out)
        for first, stop in self._blocks(self.block):
            self.block_of_logits(hidden, self.columns(first, stop), first, out[:, first:stop])
        return out

    def block_of_logits(self, hidden: Tensor, columns: Tensor, first: int, out: Tensor) -> None:
        """The logits ``out`` of the vocabulary from ``first`` on; see :meth:`columns`."""
        if self.adapter is None:
            multiply(hidden, columns.T, self.acc_dtype, out=out)
            return
        multiply(hidden[:, : self.width], columns.T, self.acc_dtype, out=out)
        part = self.adapter[first : first + columns.shape[0]]
        add_product(out, hidden[:, self.width :], part.T)

    def hidden_gradient(self, dy: Tensor) -> Tensor:
        """``dy [n, V] @ weight -> [n, D]`` in acc_dtype; ``[n, D + r]`` with an adapter."""
        total = low = None
        for first, stop in self._blocks_of(dy):
            weight = self.columns(first, stop)
            part = dy[:, first:stop].to(weight.dtype)
            total = self._sum(total, part, weight)
            if self.adapter is not None:
                low = self._sum(low, part, self.adapter[first:stop])
        assert total is not None
        return total if low is None else torch.cat([total, low], dim=1)

    def _sum(self, total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        """``total + a @ b``, in the place of ``total``."""
        if total is None:
            return multiply(a, b, self.acc_dtype)
        add_product(total, a, b)
        return total

    def weight_gradient(
        self,
        dy: Tensor,
        hidden: Tensor,
        out: Tensor,
        factor: Tensor | None = None,
        *,
        adds: bool = True,
    ) -> None:
        """``out [V, D] += dy.T @ hidden`` for ``dy [n, V]``, times ``factor []``.

        ``out`` is in acc_dtype. See :func:`add_product`.
        """
        for first, stop in self._blocks_of(dy):
            part = dy[:, first:stop].to(hidden.dtype)
            add_product(out[first:stop], part.T, hidden, factor, adds=adds)

    def _blocks_of(self, dy: Tensor) -> Iterator[tuple[int, int]]:
        """Blocks of columns, small where ``dy`` is copied to the operands' type."""
        vocabulary = self.weight.shape[0]
        wanted = gemm_dtype(self.operand, self.acc_dtype, dy.device.type)
        return self._blocks(
            self.block if dy.dtype == wanted else min(self.block, -(-vocabulary // 8))
        )


def squared_norms(weight: Tensor, acc_dtype: torch.dtype, budget: int) -> Tensor:
    """``|W_v|^2`` of each row, ``[V]`` in ``acc_dtype``."""
    block = max(1, budget // (2 * weight.shape[1] * acc_dtype.itemsize))
    norms = weight.new_empty(weight.shape[0], dtype=acc_dtype)
    for part, out in zip(weight.split(block), norms.split(block), strict=True):
        torch.sum(part.to(acc_dtype).square(), dim=1, out=out)
    return norms


def transform_logits(
    y: Tensor, bias: Tensor | None, settings: Settings, slope: Tensor | None
) -> None:
    """Turns ``y`` into ``z`` in place, and fills ``slope``, if given, with the softcap's slope."""
    if bias is not None:
        y += bias
    scale = 1.0 / settings.temperature
    if settings.softcap is not None:
        y.div_(settings.softcap).tanh_()
        if slope is not None:
            torch.square(y, out=slope).neg_().add_(1)
        scale *= settings.softcap
    if scale != 1.0:
        y.mul_(scale)
