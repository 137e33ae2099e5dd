"""The choice of the backend that runs a call.

A backend says why it cannot take some inputs. ``auto`` takes the first backend that has no such
reason, and says so once in the log. If a forced backend cannot run, the call raises an error with
the backend's reasons. Nothing falls back silently.

Only a call shows what an installation lacks: a C compiler for Triton, code for this GPU, a driver
that is new enough, shared memory. So a backend makes a small call before its first real one on a
GPU (``try_out`` of its engine). That call's error is a reason, too; ``auto`` warns of it once.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any, Protocol

import torch
from torch import Tensor

from bft_kernels.precision import own_settings
from bft_kernels.problem import Problem, Traits, traits_of
from bft_kernels.results import (
    Documents,
    Forward,
    Gradients,
    Saved,
    WeightedLoss,
)

logger = logging.getLogger("bft_kernels")

# Packages of bft_kernels.backends, in order of preference.
BACKENDS = ("cpu", "triton", "cuda", "torch")


class Engine(Protocol):
    """The functions that a backend's ``engine`` offers."""

    def linear_nll(self, problem: Problem) -> Forward: ...

    def linear_nll_backward(
        self,
        problem: Problem,
        grad: Tensor,  # [N]
        saved: Saved,
        grad_weight: Tensor | None,  # [V, D], added to in place; a new one if None
    ) -> Gradients: ...

    def weighted_loss(
        self,
        problem: Problem,
        token_scale: Tensor,  # [N], the factor of each token's weight
        documents: Documents | None,  # None for weights local to a token
    ) -> WeightedLoss: ...


@functools.cache
def backend_package(name: str) -> Any:
    """The package that says whether a backend can run; see :mod:`bft_kernels.backends`.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, expected 'auto' or one of {BACKENDS}")
    return importlib.import_module(f"bft_kernels.backends.{name}")


@functools.cache
def engine(name: str) -> Any:
    """The engine of a backend, an :class:`Engine`."""
    return importlib.import_module(f"bft_kernels.backends.{name}.engine")


def why_not(
    name: str,
    hidden: Tensor | Traits,
    weight: Tensor | Traits,
    operand: torch.dtype | None = None,
) -> list[str]:
    """Reasons why backend ``name`` cannot run on these tensors; empty if it can.

    Args:
        name: the backend's name.
        hidden, weight: the tensors of the call, or their traits.
        operand: the type to which operands of GEMMs are rounded; by default the common type.

    Raises:
        ValueError: the name is unknown.
    """
    hidden = traits_of(hidden) if isinstance(hidden, Tensor) else hidden
    weight = traits_of(weight) if isinstance(weight, Tensor) else weight
    operand = operand or torch.promote_types(hidden.dtype, weight.dtype)
    reasons: list[str] = backend_package(name).why_not(hidden, weight)
    return reasons or _why_tried(name, weight.device, operand)


def _why_tried(name: str, device: torch.device, operand: torch.dtype | None) -> list[str]:
    """The error of a backend's small call on a GPU, if any; see :func:`try_out`."""
    if device.type != "cuda":
        return []
    call = name, device, operand
    if call not in _tried and captures(device):
        return []  # no code can be loaded in a capture; the call itself will raise
    failure = try_out(*call)
    _tried.add(call)
    return [failure] if failure else []


_tried: set[tuple[str, torch.device, torch.dtype | None]] = set()


# An error with one of these parts says nothing about a backend: the memory is taken, or a setting
# of the process forbids the call.
_PASSING = ("ALLOC_FAILED", "NOT_INITIALIZED", "out of memory", "CUBLAS_WORKSPACE_CONFIG")


@functools.cache
def try_out(name: str, device: torch.device, operand: torch.dtype | None) -> str:
    """A small call's error; empty if there is none. Without ``operand`` it tries no 16-bit GEMM."""
    try:
        x = torch.zeros((), device=device, dtype=torch.float32)
        with own_settings(x), torch.no_grad():
            getattr(engine(name), "try_out", lambda *_: None)(device, operand)
    except torch.OutOfMemoryError:
        raise  # a lack of memory is no property of the backend
    except Exception as error:
        if any(passing in str(error) for passing in _PASSING):
            raise
        of = "" if operand is None else f" in {str(operand).removeprefix('torch.')}"
        lines = str(error).strip().splitlines() or ["no message"]
        return f"a small call on {device}{of} failed: {type(error).__name__}: {lines[0]}"
    return ""


def _candidates(name: str, device: str) -> tuple[str, ...]:
    """The backends that ``name`` stands for on a type of device, in order of preference."""
    if name != "auto":
        backend_package(name)
        return (name,)
    places = {b: getattr(backend_package(b), "UNASKED_ON", (device,)) for b in BACKENDS}
    return tuple(backend for backend, devices in places.items() if device in devices)


def captures(device: torch.device) -> bool:
    """Whether ``device`` is a GPU and a CUDA graph is being captured.

    A capture tries nothing out (see :func:`_why_tried`), so its choice must not be remembered.
    """
    return (
        device.type == "cuda"
        and torch.cuda.is_initialized()
        and torch.cuda.is_current_stream_capturing()
    )


@functools.cache
def select(name: str, hidden: Traits, weight: Traits, operand: torch.dtype) -> Engine:
    """The engine to run. For the arguments see :func:`why_not`.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the forced backend, or every backend, has a reason not to run.
    """
    refusals = {}
    for backend in _candidates(name, hidden.device.type):
        reasons = backend_package(backend).why_not(hidden, weight)
        if not reasons:
            reasons = _why_tried(backend, weight.device, operand)
            if reasons and name == "auto":
                _warn(backend, reasons[0])
        if not reasons:
            if name == "auto":
                _announce(backend, str(hidden.device), str(hidden.dtype))
            return engine(backend)
        refusals[backend] = "; ".join(reasons)
    text = ", ".join(f"{backend}: {reasons}" for backend, reasons in refusals.items())
    raise RuntimeError(f"backend: got {name!r}, which cannot run here ({text})")


def offered(function: str, name: str, x: Traits) -> Any:
    """``function`` of the first engine that can run on ``x``; ``None`` if it has no such function.

    No engine is no error: losses or gradients exist already, and plain PyTorch can do the rest.
    """
    choose = _offered.__wrapped__ if captures(x.device) else _offered
    return choose(function, name, x)


@functools.cache
def _offered(function: str, name: str, x: Traits) -> Any:
    for backend in _candidates(name, x.device.type):
        if not backend_package(backend).why_not(x, x) and not _why_tried(backend, x.device, None):
            return getattr(engine(backend), function, None)
    return None


@functools.cache
def _warn(name: str, reason: str) -> None:
    logger.warning("backend %s is not used: %s", name, reason)


@functools.cache
def _announce(name: str, device: str, dtype: str) -> None:
    logger.info("backend %s for %s on %s", name, dtype, device)
