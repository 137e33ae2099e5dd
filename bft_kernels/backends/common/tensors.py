"""What tensors and devices our own kernels take, on any backend."""

from collections.abc import Callable

import torch

from bft_kernels.problem import Traits


def why_not_tensors(
    hidden: Traits, weight: Traits, takes: str, runs_on: Callable[[Traits], bool]
) -> list[str]:
    """Reasons why kernels cannot take these tensors; ``takes`` says what they take instead."""
    reasons = []
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if not runs_on(tensor):
            reasons.append(f"{name} is on {tensor.device}, it takes {takes}")
        elif tensor.layout != torch.strided:
            reasons.append(f"{name} has layout {tensor.layout}, it takes strided tensors")
        elif tensor.dtype == torch.float64:
            reasons.append(f"{name} is float64, it computes in float32")
    return reasons


def why_not_capability(tensor: Traits) -> list[str]:
    """The reason, if an NVIDIA GPU is too old."""
    capability = torch.cuda.get_device_capability(tensor.device)
    if capability < (8, 0):
        return [f"the device has compute capability {capability}, it takes (8, 0) on"]
    return []


def processors(device: torch.device) -> int:
    """Multiprocessors of a device; 4 if it has no GPU, where tests run the kernels."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
