"""CUDA C++ kernels, compiled ahead of time: the fast path on a GPU without Triton.

The modules follow a call: ``inputs``, ``forward``, then ``sampled`` (the sampled gradient's lists)
or ``recompute`` (the exact one). ``weights`` makes token and sequence weights from losses. All of
them reach the kernels through ``native._cuda``.
"""

from __future__ import annotations

from bft_kernels.backends.cuda.core import linear_nll, linear_nll_backward
from bft_kernels.backends.cuda.weighted import weighted_loss
from bft_kernels.backends.cuda.weights import balanced_loss

__all__ = ["balanced_loss", "linear_nll", "linear_nll_backward", "weighted_loss"]
