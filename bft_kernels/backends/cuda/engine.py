"""What the backend offers: the engine for a device with kernels in CUDA C++."""

from __future__ import annotations

from functools import partial

from bft_kernels.backends.common import on_device
from bft_kernels.backends.cuda import kernels
from bft_kernels.backends.cuda.scale import scale_
from bft_kernels.backends.cuda.trial import try_out
from bft_kernels.backends.cuda.weighting import balanced_loss

__all__ = [
    "balanced_loss",
    "linear_nll",
    "linear_nll_backward",
    "scale_",
    "try_out",
    "weighted_loss",
]

linear_nll = partial(on_device.linear_nll, kernels)
weighted_loss = partial(on_device.weighted_loss, kernels)
linear_nll_backward = partial(on_device.linear_nll_backward, kernels)
