"""A small call that is made before the first real one on a GPU; see ``dispatch``."""

from __future__ import annotations

import torch

from bft_kernels.backends.common import on_device
from bft_kernels.backends.common import trial as products
from bft_kernels.backends.triton import kernels
from bft_kernels.problem import Problem
from bft_kernels.results import Wanted
from bft_kernels.settings import Settings


def losses_of_ones(device: torch.device, operand: torch.dtype | None) -> torch.Tensor:
    """``[2]`` float32: the loss of two rows whose 32 logits are equal, made in tiles."""
    dtype = operand or torch.float32
    hidden = torch.ones(2, 256, dtype=dtype, device=device)
    weight = torch.ones(32, 256, dtype=dtype, device=device)
    target = torch.zeros(2, dtype=torch.int64, device=device)
    settings, none = Settings(backend="triton", max_buffer_bytes=1), Wanted(False, False, False)
    problem = Problem(hidden, weight, target, None, None, settings, dtype, none)
    return on_device.linear_nll(kernels, problem).loss


def try_out(device: torch.device, operand: torch.dtype | None) -> None:
    """Raises the error that stops the kernels or GEMMs on ``device``.

    For example: no C compiler for the kernels' launcher, too little shared memory, or a driver that
    does not take their code.
    """
    products.try_out(device, operand)
    losses_of_ones(device, operand)
