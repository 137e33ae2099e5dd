"""The small call that is made before the first one on a GPU; see ``dispatch``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bft_kernels.backends.common import trial as products
from bft_kernels.backends.triton.configs import precision_for, trial_tile, triton_dtype
from bft_kernels.backends.triton.device import logit_tile


@triton.jit
def _trial_kernel(
    hidden_ptr,  # [BLOCK_N, D]
    weight_ptr,  # [BLOCK_V, D]
    out_ptr,  # [BLOCK_N, BLOCK_V]
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of logits: it takes the shared memory and the registers of a forward's."""
    rows, columns = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_V)
    z = logit_tile(
        hidden_ptr + rows * D,
        weight_ptr,
        weight_ptr,
        columns,
        BLOCK_V,
        D,
        1.0,
        1.0,
        D=D,
        BLOCK_N=BLOCK_N,
        BLOCK_V=BLOCK_V,
        BLOCK_D=BLOCK_D,
        HAS_BIAS=False,
        HAS_CAP=False,
        OPERAND=OPERAND,
        PRECISION=PRECISION,
    )
    tl.store(out_ptr + rows * BLOCK_V + columns[None, :], z)


def logits_of_ones(device: torch.device, operand: torch.dtype | None) -> torch.Tensor:
    """``[block_n, block_v]`` float32: how many elements a row has, in every place."""
    tile, dtype = trial_tile(operand), operand or torch.float32
    width = 4 * tile.block_d
    hidden = torch.ones(tile.block_n, width, dtype=dtype, device=device)
    weight = torch.ones(tile.block_v, width, dtype=dtype, device=device)
    out = torch.empty(tile.block_n, tile.block_v, dtype=torch.float32, device=device)
    _trial_kernel[(1,)](
        hidden,
        weight,
        out,
        D=width,
        OPERAND=triton_dtype(dtype),
        PRECISION=precision_for(dtype),
        **tile.constants(),
    )
    return out


def try_out(device: torch.device, operand: torch.dtype | None) -> None:
    """Raises what keeps the kernels from ``device``: no C compiler for what launches them, too
    little shared memory, a driver that does not take their code; or what keeps the products.
    """
    products.try_out(device, operand)
    logits_of_ones(device, operand)
