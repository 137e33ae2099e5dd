"""A small call that is made before the first real one on a GPU; see ``dispatch``."""

import torch

from bft_kernels.backends.common.gemm import add_product, multiply


def try_out(device: torch.device, operand: torch.dtype | None) -> None:
    """Raises an error if ``device`` cannot run the GEMMs of 16-bit operands.

    Torch has these GEMMs with a float32 result from 2.8 on for NVIDIA, and from 2.10 on for AMD.
    """
    if operand is None or operand.itemsize != 2:
        return
    a = torch.ones(16, 16, dtype=operand, device=device)
    total = multiply(a, a, torch.float32)
    multiply(a, a, torch.float32, out=total)
    add_product(total, a, a)
