"""Which backend runs a call.

A backend says why it cannot take some inputs; ``auto`` takes the first that has no reason and says
so once in the log. A forced backend that cannot raises with its reasons: nothing falls back
silently.

What an installation lacks shows in a call only: a C compiler for Triton, code for this GPU, a
driver that is new enough, shared memory. Before its first call on a GPU a backend makes a small one
(``trial`` in its package), whose error is a reason as good as any; ``auto`` warns of it once.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bft_kernels.config import CoreConfig, Weighting
from bft_kernels.precision import own_settings
from bft_kernels.results import (
    BalancedLoss,
    Documents,
    Forward,
    Gradients,
    Saved,
    Wanted,
    WeightedLoss,
)
from bft_kernels.weighting import balanced_loss

logger = logging.getLogger("bft_kernels")

# loss [N], labelled [N], cu_seqlens [S + 1], num_items [] or None, normalize, weighting
BalancedLossFunction = Callable[
    [Tensor, Tensor, Tensor, Tensor | None, str, Weighting], BalancedLoss
]


class Implementation(Protocol):
    """What a backend's module offers."""

    def linear_nll(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
        config: CoreConfig,
    ) -> Forward: ...

    def linear_nll_backward(
        self,
        grad: Tensor,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        saved: Saved,
        config: CoreConfig,
        wanted: Wanted,
        grad_weight: Tensor | None,
    ) -> Gradients: ...

    def weighted_loss(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        share: Tensor,
        documents: Documents | None,
        bias: Tensor | None,
        config: CoreConfig,
        weighting: Weighting,
        wanted: Wanted,
    ) -> WeightedLoss: ...


@dataclass(frozen=True)
class Backend:
    """A named implementation and the reasons why it may not apply, as far as tensors tell."""

    name: str
    why_not: Callable[[Tensor, Tensor], list[str]]
    module: str
    unasked_on: tuple[str, ...] | None = None  # types of devices where "auto" may take it; any
    tried: bool = True  # whether it makes a small call before its first on a GPU
    balances: bool = False  # whether it has a `balanced_loss` of its own

    def load(self) -> Implementation:
        return importlib.import_module(self.module)


_HALF = (torch.bfloat16, torch.float16)


def _why_not_torch(hidden: Tensor, weight: Tensor) -> list[str]:
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


def _why_not_tensors(
    hidden: Tensor, weight: Tensor, takes: str, runs_on: Callable[[Tensor], bool]
) -> list[str]:
    """What keeps kernels of our own from these tensors; ``takes`` says what they want instead."""
    reasons = []
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if not runs_on(tensor):
            reasons.append(f"{name} is on {tensor.device}, it takes {takes}")
        elif tensor.layout != torch.strided:
            reasons.append(f"{name} has layout {tensor.layout}, it takes strided tensors")
        elif tensor.dtype == torch.float64:
            reasons.append(f"{name} is float64, it computes in float32")
    return reasons


def _why_not_capability(tensor: Tensor) -> list[str]:
    """Whether an NVIDIA GPU is too old."""
    capability = torch.cuda.get_device_capability(tensor.device)
    if capability < (8, 0):
        return [f"the device has compute capability {capability}, it takes (8, 0) on"]
    return []


def _why_not_cpu(hidden: Tensor, weight: Tensor) -> list[str]:
    reasons = []
    if importlib.util.find_spec("bft_kernels._cpu") is None:
        reasons.append("bft_kernels._cpu is not built (see BFT_BUILD in setup.py)")
    reasons += _why_not_tensors(
        hidden, weight, "tensors on the CPU", lambda tensor: tensor.device.type == "cpu"
    )
    if weight.layout == torch.strided and weight.dim() == 2:
        rows, columns = weight.stride()
        count, width = weight.shape
        if (columns != 1 and width > 1) or (rows < width and count > 1):
            reasons.append(f"weight has strides {weight.stride()}, it takes contiguous rows")
    return reasons


def _why_not_triton(hidden: Tensor, weight: Tensor) -> list[str]:
    if importlib.util.find_spec("triton") is None:
        return ["triton is not installed"]
    takes = "CUDA tensors (on a CPU with TRITON_INTERPRET=1, for tests)"
    reasons = _why_not_tensors(
        hidden,
        weight,
        takes,
        lambda tensor: tensor.device.type == "cuda" or _is_interpreted(tensor),
    )
    if not reasons and weight.device.type == "cuda" and torch.version.cuda is not None:
        reasons += _why_not_capability(weight)
    return reasons


def _is_interpreted(tensor: Tensor) -> bool:
    import triton

    return tensor.device.type == "cpu" and bool(triton.knobs.runtime.interpret)


def _why_not_cuda(hidden: Tensor, weight: Tensor) -> list[str]:
    from bft_kernels.backends.cuda import native

    reasons = native.why_not()
    reasons += _why_not_tensors(
        hidden, weight, "CUDA tensors", lambda tensor: tensor.device.type == native.DEVICE
    )
    if not reasons and weight.device.type == "cuda":
        reasons += _why_not_capability(weight)
    return reasons


# In order of preference.
BACKENDS = (
    Backend("cpu", _why_not_cpu, "bft_kernels.backends.cpu", tried=False),
    Backend(
        "triton",
        _why_not_triton,
        "bft_kernels.backends.triton",
        unasked_on=("cuda",),
        balances=True,
    ),
    Backend(
        "cuda",
        _why_not_cuda,
        "bft_kernels.backends.cuda",
        unasked_on=("cuda",),
        balances=True,
    ),
    Backend("torch", _why_not_torch, "bft_kernels.backends.torch"),
)


def backend_names() -> tuple[str, ...]:
    """Names that ``backend=`` takes besides ``"auto"``."""
    return tuple(backend.name for backend in BACKENDS)


def why_not(
    name: str, hidden: Tensor, weight: Tensor, operand: torch.dtype | None = None
) -> list[str]:
    """Reasons why backend ``name`` cannot run on these tensors; empty if it can.

    Args:
        name: of the backend.
        hidden, weight: what it is asked to take.
        operand: the type its products' operands are rounded to, where that is not theirs.
    """
    backend = _named(name)
    operand = operand or torch.promote_types(hidden.dtype, weight.dtype)
    return backend.why_not(hidden, weight) or _why_tried(backend, weight.device, operand)


def _named(name: str) -> Backend:
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    raise ValueError(f"backend: got {name!r}, expected 'auto' or one of {backend_names()}")


def _why_tried(backend: Backend, device: torch.device, operand: torch.dtype | None) -> list[str]:
    """What its small call on a GPU raised; without ``operand`` any product will do."""
    if not backend.tried or device.type != "cuda":
        return []
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return []  # code cannot be loaded now; the call itself will say so
    failure = try_out(backend.module, device, operand)
    return [failure] if failure else []


# Of errors that say nothing about a backend: memory that others have, a setting of the process.
_PASSING = ("ALLOC_FAILED", "NOT_INITIALIZED", "out of memory", "CUBLAS_WORKSPACE_CONFIG")


@functools.cache
def try_out(module: str, device: torch.device, operand: torch.dtype | None) -> str:
    """The error of a backend's small call on a device; empty if there was none."""
    try:
        x = torch.zeros((), device=device, dtype=torch.float32)
        with own_settings(x), torch.no_grad():
            importlib.import_module(f"{module}.trial").try_out(device, operand)
    except torch.OutOfMemoryError:
        raise  # is no property of the backend
    except Exception as error:
        if any(passing in str(error) for passing in _PASSING):
            raise
        of = "" if operand is None else f" in {str(operand).removeprefix('torch.')}"
        lines = str(error).strip().splitlines() or ["no message"]
        return f"a small call on {device}{of} failed: {type(error).__name__}: {lines[0]}"
    return ""


def _wanted(name: str, device: str) -> tuple[str, ...]:
    if name != "auto":
        return (name,)
    return tuple(b.name for b in BACKENDS if b.unasked_on is None or device in b.unasked_on)


def select(
    name: str, hidden: Tensor, weight: Tensor, operand: torch.dtype | None = None
) -> Implementation:
    """The implementation to run. For the arguments see :func:`why_not`.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the forced backend, or every backend, has a reason not to run.
    """
    operand = operand or torch.promote_types(hidden.dtype, weight.dtype)
    refusals = {}
    for backend in _wanted(name, hidden.device.type):
        reasons = _named(backend).why_not(hidden, weight)
        if not reasons:
            reasons = _why_tried(_named(backend), weight.device, operand)
            if reasons and name == "auto":
                _warn(backend, reasons[0])
        if not reasons:
            if name == "auto":
                _announce(backend, str(hidden.device), str(hidden.dtype))
            return _load(backend)
        refusals[backend] = "; ".join(reasons)
    text = ", ".join(f"{backend}: {reasons}" for backend, reasons in refusals.items())
    raise RuntimeError(f"backend: got {name!r}, which cannot run here ({text})")


def select_balanced_loss(name: str, loss: Tensor) -> BalancedLossFunction:
    """What makes weights from token losses: the kernels of a backend that may run, or torch code.

    The losses are there already, so no backend is refused here.
    """
    wanted = _wanted(name, loss.device.type)
    for backend in BACKENDS:
        if not backend.balances or backend.name not in wanted:
            continue
        if not backend.why_not(loss, loss) and not _why_tried(backend, loss.device, None):
            function: BalancedLossFunction = importlib.import_module(backend.module).balanced_loss
            return function
    return _plain_balanced_loss


def _plain_balanced_loss(
    loss: Tensor,
    labelled: Tensor,
    cu_seqlens: Tensor,
    num_items: Tensor | None,
    normalize: str,
    weighting: Weighting,
) -> BalancedLoss:
    settings = (weighting.scheme, weighting.window, weighting.gamma, weighting.floor)
    return balanced_loss(loss, labelled, cu_seqlens, num_items, normalize, *settings)


@functools.cache
def _load(name: str) -> Implementation:
    return _named(name).load()


@functools.cache
def _warn(name: str, reason: str) -> None:
    logger.warning("backend %s is not used: %s", name, reason)


@functools.cache
def _announce(name: str, device: str, dtype: str) -> None:
    logger.info("backend %s for %s on %s", name, dtype, device)
