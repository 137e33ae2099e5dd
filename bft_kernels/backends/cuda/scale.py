"""Multiplies a gradient that was made in the forward by its upstream gradient, in place."""

from __future__ import annotations

from torch import Tensor

from bft_kernels.backends.cuda.native import TYPES, _cuda, launch


def scale_(x: Tensor, factor: Tensor) -> None:
    """``x *= factor []``, contiguous, rounded once; the host does not learn the factor."""
    reads = {"factor": factor.float()}
    launch(_cuda.scale, reads, {"x": x}, dtype=TYPES[x.dtype], count=x.numel())
