"""A small call, made before the first one on a GPU; see ``dispatch``."""

from __future__ import annotations

import torch

from bft_kernels.backends.cuda.core import linear_nll, linear_nll_backward
from bft_kernels.config import CoreConfig
from bft_kernels.results import Saved, Wanted


def try_out(device: torch.device, operand: torch.dtype | None) -> None:
    """Raises what keeps the kernels from ``device``: a module built for other GPUs or for a newer
    driver, or too little shared memory.
    """
    dtype = operand or torch.float32
    config = CoreConfig(
        eps=2**-10,
        residual="recompute",
        operand=str(dtype).removeprefix("torch."),
        backend="cuda",
        max_buffer_bytes=2**20,
    )
    hidden = torch.ones(2, 16, dtype=dtype, device=device)
    weight = torch.ones(32, 16, dtype=dtype, device=device)
    target = torch.zeros(2, dtype=torch.int64, device=device)
    out = linear_nll(hidden, weight, target, None, None, config)
    entries = (out.entry_offsets, out.entry_columns, out.entry_values)
    saved = Saved(out.nll, out.lse, out.lse_low, *entries, None)
    wanted = Wanted(hidden=True, weight=True, bias=False)
    linear_nll_backward(out.nll, hidden, weight, target, None, saved, config, wanted, None)
