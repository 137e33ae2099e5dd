"""The functions that the backend offers."""

from bft_kernels.backends.cpu.backward import linear_nll_backward
from bft_kernels.backends.cpu.forward import linear_nll
from bft_kernels.backends.cpu.weighted import weighted_loss

HOLDS_ROWS = False  # a block of logits has some columns of its rows

__all__ = ["linear_nll", "linear_nll_backward", "weighted_loss"]
