"""What the engine takes; see :class:`bft_kernels.backends.common.on_device.Kernels`."""

from __future__ import annotations

import torch

from bft_kernels.backends.common.inputs import Inputs
from bft_kernels.backends.triton.entries import list_rows
from bft_kernels.backends.triton.forward import run_tiles
from bft_kernels.backends.triton.recompute import recompute
from bft_kernels.backends.triton.softmax import certificate_rows, gradient_rows, softmax_rows
from bft_kernels.backends.triton.spmm import spmm
from bft_kernels.backends.triton.weighting import weigh

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

ROW_BIAS: torch.dtype | None = None
TILES_GRADIENTS = False
make_inputs = Inputs.of


def written(dtype: torch.dtype, operand: torch.dtype) -> torch.dtype:
    """Kernels write any type."""
    return dtype


def spmm_takes(width: int) -> bool:
    """Rows of any width."""
    return True
