"""A small call, made before the first one on a GPU; see ``dispatch``."""

from __future__ import annotations

import torch

from bft_kernels.backends.common.gemm import add_product, multiply


def try_out(device: torch.device, operand: torch.dtype | None) -> None:
    """Raises what keeps the products from ``device``, of operands in 16 bits: torch before 2.8 on
    NVIDIA and before 2.10 on AMD does not have them with a float32 result.
    """
    if operand is None or operand.itemsize != 2:
        return
    a = torch.ones(16, 16, dtype=operand, device=device)
    total = multiply(a, a, torch.float32)
    multiply(a, a, torch.float32, out=total)
    add_product(total, a, a)
