"""The backend that always works: plain PyTorch in blocks under the byte budget, on any device.

On an accelerator ``gradient="sampled"`` reads the number of kept entries back to the host, once a
tile; everything else runs without waiting for the device.
"""

from __future__ import annotations

from bft_kernels.backends.torch.backward import linear_nll_backward
from bft_kernels.backends.torch.forward import linear_nll
from bft_kernels.backends.torch.weighted import weighted_loss

__all__ = ["linear_nll", "linear_nll_backward", "weighted_loss"]
