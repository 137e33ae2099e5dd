"""``bft_kernels._cuda``: how tensors reach it.

A launch is a call like ``launch(_cuda.squared_norms, {}, {"norms": norms}, problem=problem)``: what
it reads, what it writes, and the rest. What a kernel takes is said in ``csrc/bindings/cuda.cpp``,
which refuses all else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

# Where tensors must be. Tests run the kernels on a CPU, in an emulation.
DEVICE = "cuda"
# Numbers of the operands' types.
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def kernels() -> ModuleType:
    """The compiled module."""
    from bft_kernels import _cuda

    return _cuda


if TYPE_CHECKING:
    from bft_kernels import _cuda as _cuda
else:

    class _Kernels:
        """The compiled module, imported by its first use: it need not be built."""

        def __getattr__(self, name):
            return getattr(kernels(), name)

    _cuda = _Kernels()


def launch(
    kernel: Callable[..., None],
    reads: Mapping[str, Tensor | None],
    writes: Mapping[str, Tensor | None],
    **others: object,
) -> None:
    """A launch on the current stream, which may also read what it writes."""
    arrays = {f"{name}_ptr": ptr(x) for name, x in reads.items()}
    arrays |= {f"{name}_ptr": out(x) for name, x in writes.items()}
    stream = torch.cuda.current_stream().cuda_stream if DEVICE == "cuda" else 0
    kernel(**arrays, **others, stream=stream)


def ptr(x: Tensor | None) -> int:
    """The address of what a kernel reads; 0 for what is not there or empty.

    It keeps no tensor alive.
    """
    return address(x, writable=False)


def out(x: Tensor | None) -> int:
    """The address of what a kernel writes, or both reads and writes; 0 as for :func:`ptr`."""
    return address(x, writable=True)


def address(x: Tensor | None, *, writable: bool) -> int:
    """``writable`` is for tests, which check what kernels touch."""
    return 0 if x is None or x.numel() == 0 else x.data_ptr()


def processors(device: torch.device) -> int:
    """Multiprocessors of a device."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
