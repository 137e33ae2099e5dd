"""Multiplies a gradient that was made in the forward by its upstream gradient, in place."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bft_kernels.backends.triton.configs import interpreted

# Elements of a step, and steps of a program.
BLOCK, STEPS = (64, 2) if interpreted() else (4096, 16)


@triton.jit(do_not_specialize=["count"])
def _scale_kernel(
    x_ptr,  # [count]
    factor_ptr,  # []
    count,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """``x * factor`` in float32; a factor of 1, as in ``loss.backward()``, moves nothing."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor == 1.0:
        return
    first = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS) + tl.arange(0, BLOCK)
    for step in range(STEPS):
        place = first + step * BLOCK
        x = tl.load(x_ptr + place, mask=place < count, other=0.0).to(tl.float32)
        tl.store(x_ptr + place, x * factor, mask=place < count)


def scale_(x: Tensor, factor: Tensor) -> None:
    """``x *= factor []`` for a contiguous ``x``, rounded once. The host never reads the factor."""
    if x.numel():
        grid = (triton.cdiv(x.numel(), BLOCK * STEPS),)
        _scale_kernel[grid](x, factor, x.numel(), BLOCK=BLOCK, STEPS=STEPS)
