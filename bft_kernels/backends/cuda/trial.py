"""A small call, made before the first one on a GPU; see ``dispatch``."""

from __future__ import annotations

import torch

from bft_kernels.backends.cuda.core import linear_nll, linear_nll_backward
from bft_kernels.problem import Problem
from bft_kernels.results import Saved, Wanted
from bft_kernels.settings import Settings


def try_out(device: torch.device, operand: torch.dtype | None) -> None:
    """Raises what keeps the kernels from ``device``: a module built for other GPUs or for a newer
    driver, or too little shared memory.
    """
    dtype = operand or torch.float32
    hidden = torch.ones(2, 16, dtype=dtype, device=device)
    weight = torch.ones(32, 16, dtype=dtype, device=device)
    target = torch.zeros(2, dtype=torch.int64, device=device)
    settings = Settings(eps=2**-10, backend="cuda", max_buffer_bytes=2**20)
    wanted = Wanted(hidden=True, weight=True, bias=False)
    problem = Problem(hidden, weight, target, None, None, settings, dtype, wanted)
    out = linear_nll(problem)
    linear_nll_backward(problem, out.nll, Saved(*(getattr(out, name) for name in Saved._fields)))
