"""The fast path on a GPU: Triton kernels, chunked over the vendor's GEMM or tiled in registers.

The engine is ``common.on_device``; ``kernels`` lists what it takes. The host never waits for the
device: the device counts the rows, lists have room for the expected entries, and rows without room
are computed again. The modules follow a call: ``softmax`` (chunked) or ``inputs``, ``lse_bound``,
``forward`` and ``certificate`` (tiled), then ``entries`` and ``spmm`` (the sampled gradient) or
``recompute`` (the exact one). ``weighting`` makes token and sequence weights from losses.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

from bft_kernels.backends.common.tensors import why_not_capability, why_not_tensors
from bft_kernels.problem import Traits

UNASKED_ON = ("cuda",)

_is_installed = functools.cache(lambda: importlib.util.find_spec("triton") is not None)


def why_not(hidden: Traits, weight: Traits) -> list[str]:
    """Reasons why the backend cannot take these tensors."""
    if not _is_installed():
        return ["triton is not installed"]
    reasons = why_not_tensors(
        hidden,
        weight,
        "CUDA tensors (on a CPU with TRITON_INTERPRET=1, for tests)",
        lambda tensor: tensor.device.type == "cuda" or _is_interpreted(tensor),
    )
    if not reasons and weight.device.type == "cuda" and torch.version.cuda is not None:
        reasons += why_not_capability(weight)
    return reasons


def _is_interpreted(tensor: Traits) -> bool:
    import triton

    return tensor.device.type == "cpu" and bool(triton.knobs.runtime.interpret)
