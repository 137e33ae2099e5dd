"""A small call that is made before the first real one on a GPU; see ``dispatch``."""

from __future__ import annotations

import torch

from bft_kernels.backends.common import on_device
from bft_kernels.backends.common import trial as products
from bft_kernels.backends.cuda import kernels
from bft_kernels.problem import Problem
from bft_kernels.results import Saved, Wanted
from bft_kernels.settings import Settings


def try_out(device: torch.device, operand: torch.dtype | None) -> None:
    """Raises the error that stops the kernels or GEMMs on ``device``.

    For example: a module that was built for other GPUs or for a newer driver, or too little shared
    memory.
    """
    products.try_out(device, operand)
    dtype = operand or torch.float32
    hidden = torch.ones(2, 16, dtype=dtype, device=device)
    weight = torch.ones(32, 16, dtype=dtype, device=device)
    target = torch.zeros(2, dtype=torch.int64, device=device)
    # A budget of 1 byte asks for tiles, which take the most shared memory.
    settings = Settings(eps=2**-10, backend="cuda", max_buffer_bytes=1)
    wanted = Wanted(hidden=True, weight=True, bias=False)
    problem = Problem(hidden, weight, target, None, None, settings, dtype, wanted)
    out = on_device.linear_nll(kernels, problem)
    saved = Saved(*(getattr(out, name) for name in Saved._fields))
    on_device.linear_nll_backward(kernels, problem, out.nll, saved)
