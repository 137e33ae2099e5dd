"""The fast path on a GPU: Triton kernels that hold logits in registers.

The host never waits for the device: rows are counted there, lists have room for what is expected,
and what finds no room is computed again. The modules follow a call: ``rows``, ``inputs``,
``floor``, ``forward``, ``certificate``, then ``entries`` (the sampled gradient) or ``recompute``
(the exact one). ``weights`` makes token and sequence weights from losses.
"""

from __future__ import annotations

from bft_kernels.backends.triton.chunked import weighted_loss
from bft_kernels.backends.triton.core import linear_nll, linear_nll_backward
from bft_kernels.backends.triton.weights import balanced_loss

__all__ = ["balanced_loss", "linear_nll", "linear_nll_backward", "weighted_loss"]
