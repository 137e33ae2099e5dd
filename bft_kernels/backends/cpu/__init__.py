"""The fast path on a CPU: the vendor's product on a cache-sized block, then one sweep in C++.

While a block of logits is in cache, ``csrc/cpu`` takes from it everything the forward needs (see
``csrc/cpu/sweep.h``) and looks at no logit twice; only the exact weighted loss keeps logits, under
the byte budget and in the memory of ``dW`` (see ``weighted.py``). The products are ``torch.mm``;
threads are those of torch's own OpenMP runtime, and take blocks by themselves (see ``team.py``).
"""

from __future__ import annotations

from bft_kernels.backends.cpu.backward import linear_nll_backward
from bft_kernels.backends.cpu.forward import linear_nll
from bft_kernels.backends.cpu.weighted import weighted_loss

__all__ = ["linear_nll", "linear_nll_backward", "weighted_loss"]
