"""What the engine takes; see :class:`bft_kernels.backends.common.on_device.Kernels`."""

from __future__ import annotations

import torch

from bft_kernels.backends.cuda.forward import run_tiles
from bft_kernels.backends.cuda.inputs import make_inputs
from bft_kernels.backends.cuda.native import _cuda
from bft_kernels.backends.cuda.recompute import recompute
from bft_kernels.backends.cuda.rows import certificate_rows, gradient_rows, list_rows, softmax_rows
from bft_kernels.backends.cuda.spmm import spmm
from bft_kernels.backends.cuda.weighting import weigh

__all__ = [
    "ROW_BIAS",
    "TILES_GRADIENTS",
    "certificate_rows",
    "gradient_rows",
    "list_rows",
    "make_inputs",
    "recompute",
    "run_tiles",
    "softmax_rows",
    "spmm",
    "spmm_takes",
    "weigh",
    "written",
]

ROW_BIAS: torch.dtype | None = torch.float32
TILES_GRADIENTS = True


def written(dtype: torch.dtype, operand: torch.dtype) -> torch.dtype:
    """Kernels write the operands' type, or float32 for any other."""
    return operand if dtype == operand else torch.float32


def spmm_takes(width: int) -> bool:
    """Whether a thread has registers for its part of a row's sums."""
    return width <= _cuda.SPMM_MAX_WIDTH
