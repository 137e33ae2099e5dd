"""Where a forward's results by row go."""

from __future__ import annotations

import torch
from torch import Tensor

from bft_kernels.problem import Problem

# What every forward writes for a row, by the names of `Forward`.
ROW_RESULTS = ("loss", "nll", "lse", "lse_low", "entropy", "correct")


def row_results(problem: Problem, size: int, *, filled: bool = False) -> dict[str, Tensor]:
    """Vectors ``[size]`` by the names of :data:`ROW_RESULTS` and of the certificate; ``[0]`` where
    not wanted. They hold zeros if ``filled``, or anything.
    """
    make = problem.hidden.new_zeros if filled else problem.hidden.new_empty
    keeps_low = problem.saved in ("recompute", "unit")
    acc = problem.acc_dtype
    return {
        "loss": make(size, dtype=acc),
        "nll": make(size, dtype=acc),
        "lse": make(size, dtype=acc),
        "lse_low": make(size if keeps_low else 0, dtype=acc),
        "entropy": make(size if problem.statistics else 0, dtype=acc),
        "correct": make(size if problem.statistics else 0, dtype=torch.bool),
        "variance": make(size if problem.variance else 0, dtype=acc),
        "hidden_variance": make(size if problem.hidden_variance else 0, dtype=acc),
    }
