"""What the backend offers."""

from __future__ import annotations

from bft_kernels.backends.cuda.core import linear_nll, linear_nll_backward
from bft_kernels.backends.cuda.trial import try_out
from bft_kernels.backends.cuda.weighted import weighted_loss
from bft_kernels.backends.cuda.weights import balanced_loss

__all__ = ["balanced_loss", "linear_nll", "linear_nll_backward", "try_out", "weighted_loss"]
