"""The backend for any device: plain PyTorch, in blocks under the byte budget.

On an accelerator ``gradient="sampled"`` reads counts back to the host: the number of kept entries,
once a tile, and the sizes of the parts that its backward sorts.
"""

import torch

from bft_kernels.problem import Traits

_HALF = (torch.bfloat16, torch.float16)


def why_not(hidden: Traits, weight: Traits) -> list[str]:
    """Reasons why the backend cannot take these tensors."""
    reasons = []
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor.layout != torch.strided:
            reasons.append(f"{name} has layout {tensor.layout}, it takes strided tensors")
        if tensor.device.type == "meta":
            reasons.append(f"{name} is on the meta device and has no values")
    narrow = hidden.dtype in _HALF and weight.dtype in _HALF
    if narrow and hidden.device.type not in ("cpu", "cuda"):
        reasons.append(
            f"hidden and weight are {hidden.dtype} on {hidden.device.type}, where torch.mm gives "
            "no float32 result"
        )
    return reasons
