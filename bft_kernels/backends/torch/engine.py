"""The backend's engine: the chunked engine with kernels in plain PyTorch."""

from functools import partial

from bft_kernels.backends.common import chunked
from bft_kernels.backends.common.trial import try_out
from bft_kernels.backends.torch.backward import linear_nll_backward
from bft_kernels.backends.torch.rows import TorchRows
from bft_kernels.backends.torch.spread import spread_loss, spread_loss_backward

__all__ = [
    "linear_nll",
    "linear_nll_backward",
    "spread_loss",
    "spread_loss_backward",
    "try_out",
    "weighted_loss",
]

linear_nll = partial(chunked.linear_nll, TorchRows)
weighted_loss = partial(chunked.weighted_loss, TorchRows)
