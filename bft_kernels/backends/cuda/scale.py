"""Multiplies a gradient that was made in the forward by its upstream gradient, in place."""

from __future__ import annotations

from torch import Tensor

from bft_kernels.backends.cuda.native import TYPES, _cuda, out, ptr, stream


def scale_(x: Tensor, factor: Tensor) -> None:
    """``x *= factor []`` for a contiguous ``x``, rounded once. The host never reads the factor."""
    factor = factor.float()
    _cuda.scale(
        x_ptr=out(x),
        factor_ptr=ptr(factor),
        dtype=TYPES[x.dtype],
        count=x.numel(),
        stream=stream(),
    )
