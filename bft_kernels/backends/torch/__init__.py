"""The backend that always works: plain PyTorch in blocks under the byte budget, on any device.

On an accelerator ``gradient="sampled"`` reads counts back to the host: of kept entries, once a
tile, and of the parts that its backward sorts. The balanced loss copies boundaries to the device.
"""

from __future__ import annotations

from bft_kernels.backends.torch.backward import linear_nll_backward
from bft_kernels.backends.torch.forward import linear_nll
from bft_kernels.backends.torch.weighted import weighted_loss

__all__ = ["linear_nll", "linear_nll_backward", "weighted_loss"]
