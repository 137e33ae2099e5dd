"""The counter-based draws of ``gradient="sampled"``, in wrapping int32 and int64 tensor arithmetic.

:func:`bft_kernels.reference.uniforms` is the definition. This is the same function, bit for bit,
with in-place passes over a tile.
"""

import torch
from torch import Tensor


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


_GAMMA = _signed(0x9E3779B97F4A7C15, 64)
_MIX64 = (_signed(0xBF58476D1CE4E5B9, 64), _signed(0x94D049BB133111EB, 64))
_MIX32 = (_signed(0x7FEB352D, 32), _signed(0x846CA68B, 32))


def _mix64(z: Tensor) -> Tensor:
    # Shifts of int64 tensors are arithmetic: the mask makes them logical.
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * _MIX64[0]
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * _MIX64[1]
    return z ^ (z >> 31 & (1 << 33) - 1)


def row_keys(seed: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Multiplier and offset of each row, int32 ``[n]``, from int64 ``seed []`` and ``rows [n]``."""
    key = _mix64(_mix64(seed + _GAMMA) + rows * _GAMMA)
    return ((key >> 32) | 1).to(torch.int32), (key << 32 >> 32).to(torch.int32)


def scaled_uniforms(
    multiplier: Tensor,
    offset: Tensor,
    columns: Tensor,
    scale: float,
    scratch: Tensor | None = None,
) -> Tensor:
    """``u * scale`` as float32 ``[n, V]``.

    Args:
        multiplier, offset: int32 ``[n]`` from :func:`row_keys`.
        columns: int32 ``[V]``.
        scale: ``eps``, or 1 for the draws themselves. Scaling ``u`` by ``2^-24`` first is exact, so
            both become one factor.
        scratch: ``[2, n, V]`` int32 of working memory; the result lies in it.
    """
    if scratch is None:
        scratch = columns.new_empty(2, multiplier.numel(), columns.numel())
    x, shifted = scratch
    torch.mul(multiplier[:, None], columns, out=x)
    x += offset[:, None]
    for shift, factor in ((16, _MIX32[0]), (15, _MIX32[1]), (16, None)):
        torch.bitwise_right_shift(x, shift, out=shifted)
        shifted &= (1 << (32 - shift)) - 1
        x ^= shifted
        if factor is not None:
            x *= factor
    x >>= 8
    x &= (1 << 24) - 1
    return shifted.view(torch.float32).copy_(x).add_(0.5).mul_(scale * 2.0**-24)
