"""The fast path on a CPU: a GEMM on a cache-sized block, then online softmax over it in C++.

While a block of logits is in cache, ``csrc/cpu`` takes from it everything that the forward needs
(see ``csrc/cpu/online_softmax.h``), and looks at no logit twice. Only the exact weighted loss keeps
logits, under the byte budget and in the memory of ``dW`` (see ``weighted.py``). GEMMs are
``torch.mm``. The threads are those of torch's own OpenMP runtime, and each takes blocks by itself
(see ``team.py``).
"""

import functools
import importlib.util

from bft_kernels.backends.common.tensors import why_not_tensors
from bft_kernels.problem import Traits

_is_built = functools.cache(lambda: importlib.util.find_spec("bft_kernels._cpu") is not None)


def why_not(hidden: Traits, weight: Traits) -> list[str]:
    """Reasons why the backend cannot take these tensors."""
    reasons = []
    if not _is_built():
        reasons.append("bft_kernels._cpu is not built (see BFT_BUILD in setup.py)")
    reasons += why_not_tensors(
        hidden, weight, "tensors on the CPU", lambda tensor: tensor.device.type == "cpu"
    )
    if weight.strides is not None:
        reasons.append(f"weight has strides {weight.strides}, it takes contiguous rows")
    return reasons
