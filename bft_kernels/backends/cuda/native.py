"""How tensors reach ``bft_kernels._cuda``.

A launch is a call like ``_cuda.squared_norms(problem=..., norms_ptr=out(norms), stream=stream())``.
Its arguments are declared in ``bft_kernels/_cuda.pyi``, where the type checker finds them. A tensor
must have a name that outlives the call: an address keeps nothing alive.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

# Where tensors must be. Tests run the kernels on a CPU, in an emulation.
DEVICE = "cuda"
# The numbers by which kernels know the operands' types.
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def kernels() -> ModuleType:
    """The compiled module."""
    from bft_kernels import _cuda

    return _cuda


if TYPE_CHECKING:
    from bft_kernels import _cuda as _cuda
else:

    class _Kernels:
        """The compiled module, imported at its first use: it may not be built."""

        def __getattr__(self, name):
            return getattr(kernels(), name)

    _cuda = _Kernels()


def ptr(x: Tensor | None) -> int:
    """The address of what a kernel reads; 0 for ``None`` or an empty tensor."""
    return address(x, writable=False)


def out(x: Tensor | None) -> int:
    """The address of what a kernel writes, or both reads and writes; 0 as for :func:`ptr`."""
    return address(x, writable=True)


def address(x: Tensor | None, *, writable: bool) -> int:
    """``writable`` is for tests, which check what kernels touch."""
    return 0 if x is None or x.numel() == 0 else x.data_ptr()


def stream() -> int:
    """The current stream."""
    return torch.cuda.current_stream().cuda_stream if DEVICE == "cuda" else 0
