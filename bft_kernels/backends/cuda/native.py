"""``bft_kernels._cuda``: how tensors reach it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# Where tensors must be. Tests run the kernels on a CPU, in an emulation.
DEVICE = "cuda"


def kernels() -> Any:
    """The compiled module."""
    from bft_kernels import _cuda

    return _cuda


def processors(device: torch.device) -> int:
    """Multiprocessors of a device."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


class Operands(NamedTuple):
    """What kernels that make logits read: arguments of ``_cuda.Problem``."""

    tensors: dict[str, Tensor | None]
    numbers: dict[str, Any]


def addresses(tensors: dict[str, Tensor | None]) -> dict[str, int]:
    """Arguments by name; 0 for what is not there or empty."""
    return {
        f"{name}_ptr": 0 if x is None or x.numel() == 0 else x.data_ptr()
        for name, x in tensors.items()
    }


def launch(
    function: str,
    reads: dict[str, Tensor | None],
    writes: dict[str, Tensor | None],
    problem: Operands | None = None,
    **numbers: Any,
) -> None:
    """Runs a function of ``_cuda`` in the current stream.

    Args:
        function: its name.
        reads, writes: by argument, without ``_ptr``; None or an empty tensor is not wanted. What is
            read and written is among ``writes``.
        problem: its first argument, where it takes one.
        numbers: its other arguments.
    """
    module = kernels()
    if problem is not None:
        numbers["problem"] = module.Problem(**addresses(problem.tensors), **problem.numbers)
    stream = torch.cuda.current_stream().cuda_stream if DEVICE == "cuda" else 0
    getattr(module, function)(**addresses(reads | writes), **numbers, stream=stream)
