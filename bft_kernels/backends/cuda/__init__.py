"""CUDA C++ kernels, compiled ahead of time: the fast path on a GPU without Triton.

The engine is ``common.on_device``: it works in chunks, with the vendor's GEMM, or in tiles, in
registers. ``kernels`` lists what it takes. The modules follow a call: ``rows`` (chunked) or
``inputs``, ``forward`` and ``certificate`` (tiled), then ``spmm`` (the sampled gradient) or
``recompute`` (the exact one). ``weighting`` makes token and sequence weights from losses. All of
them reach the kernels through ``native._cuda``.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from bft_kernels.backends.common.tensors import why_not_capability, why_not_tensors
from bft_kernels.backends.cuda import native
from bft_kernels.problem import Traits

UNASKED_ON = ("cuda",)


def why_not(hidden: Traits, weight: Traits) -> list[str]:
    """Reasons why the backend cannot take these tensors."""
    reasons = _why_not_here() if native.DEVICE == "cuda" else []
    reasons += why_not_tensors(
        hidden, weight, "CUDA tensors", lambda tensor: tensor.device.type == native.DEVICE
    )
    if not reasons and weight.device.type == "cuda":
        reasons += why_not_capability(weight)
    return reasons


def _why_not_here() -> list[str]:
    """Reasons why the kernels cannot run on this machine."""
    reasons = []
    if find_spec("bft_kernels._cuda") is None:
        reasons.append("bft_kernels._cuda is not built (see BFT_BUILD in setup.py)")
    if not torch.cuda.is_available():
        reasons.append("there is no CUDA device (torch.cuda.is_available() is False)")
    elif torch.version.cuda is None:
        reasons.append("torch is not built for CUDA, it is for NVIDIA's GPUs only")
    return reasons
