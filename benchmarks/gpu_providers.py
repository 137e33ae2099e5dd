"""What ``python -m benchmarks gpu`` compares: this package's GPU backends and all peers."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.providers import PEERS, PROVIDERS, SAMPLED, Provider, balanced, torch_chunked
from benchmarks.shapes import Problem
from bft_kernels.dispatch import why_not


@dataclass(frozen=True)
class Candidate:
    """One loss to measure."""

    name: str
    family: str  # those of one family share a process
    run: Provider
    balanced: bool = False  # the loss is BFT's, not the plain mean
    eps: float | None = None  # of a sampled gradient
    allowed: float = 0.2  # relative error that passes for rounding, sampling or filtering
    distribution: str | None = None  # that it is installed from
    gpu_only: bool = False
    weight: int = 1  # share of the time


def liger_fused(problem: Problem) -> Tensor:
    """Liger's fused linear cross-entropy."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss: Tensor = LigerFusedLinearCrossEntropyLoss()(
        problem.weight, problem.hidden, problem.target
    )
    return loss


def quack(problem: Problem) -> Tensor:
    """QuACK's chunked linear cross-entropy, by its own choice of pipeline."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    loss: Tensor = chunked_linear_cross_entropy(problem.hidden, problem.weight, problem.target)
    return loss


@torch.no_grad()
def _forward(problem: Problem, backend: str) -> Tensor:
    return balanced(problem, backend=backend)


def _modes(
    backend: str, powers: tuple[int, ...], weight: int, *, gpu_only: bool = False
) -> list[Candidate]:
    """Exact and sampled with each ``2^-power``, with a trained and a frozen head, and forward."""
    family = f"bft {backend}"

    def mode(label: str, frozen: bool, **how: Any) -> Candidate:
        return Candidate(
            f"{family} {label}{', frozen head' if frozen else ''}",
            family,
            functools.partial(balanced, backend=backend, frozen=frozen, **how),
            balanced=True,
            eps=how.get("eps"),
            allowed=0.2 if how else 0.05,
            gpu_only=gpu_only,
            weight=weight,
        )

    forward = functools.partial(_forward, backend=backend)
    return [
        *(mode("exact", frozen) for frozen in (False, True)),
        *(
            mode(f"sampled 2^-{power}", frozen, **SAMPLED, eps=2.0**-power)
            for power in powers
            for frozen in (False, True)
        ),
        Candidate(
            f"{family} forward only",
            family,
            forward,
            balanced=True,
            gpu_only=gpu_only,
            weight=weight,
        ),
    ]


def _peer(
    name: str, run: Provider, distribution: str | None = None, *, gpu_only: bool = False
) -> Candidate:
    return Candidate(name, name, run, distribution=distribution, gpu_only=gpu_only)


# In order of importance, except that the last two compile or tune for long: they get what is left.
CANDIDATES = (
    *_modes("triton", (12, 10, 8), weight=2),
    *_modes("cuda", (12, 10, 8), weight=1, gpu_only=True),
    _peer("eager", PROVIDERS["eager"]),
    _peer("liger fused", liger_fused, "liger-kernel"),
    _peer("cut-cross-entropy", PEERS["cut-cross-entropy"], "cut-cross-entropy", gpu_only=True),
    Candidate("torch chunked", "torch chunked", torch_chunked),
    Candidate(
        "torch chunked, 1024 rows", "torch chunked", functools.partial(torch_chunked, rows=1024)
    ),
    *_modes("torch", (12,), weight=1),
    _peer("trl", PEERS["trl"], "trl"),
    _peer("compiled eager", PEERS["compiled eager"]),
    _peer("quack", quack, "quack-kernels", gpu_only=True),
)


def find(name: str) -> Candidate:
    """A candidate by its name, or one's own as ``module:function``.

    Raises:
        ValueError: no such name.
    """
    for candidate in CANDIDATES:
        if candidate.name == name:
            return candidate
    module, separator, function = name.partition(":")
    if not separator:
        names = ", ".join(repr(candidate.name) for candidate in CANDIDATES)
        raise ValueError(f"providers: got {name!r}, expected module:function or some of {names}")
    return _peer(name, lambda problem: getattr(importlib.import_module(module), function)(problem))


def why_missing(candidate: Candidate, device: str) -> str:
    """Why it cannot run here, as far as that shows without running it; empty if it can."""
    if candidate.distribution is not None:
        try:
            importlib.metadata.version(candidate.distribution)
        except importlib.metadata.PackageNotFoundError:
            return f"{candidate.distribution} is not installed"
    if candidate.family == "torch chunked" and not hasattr(functional, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no linear_cross_entropy; it came with 2.13"
    if candidate.gpu_only and device == "cpu":
        return "it runs on a GPU only"
    ours, _, backend = candidate.family.partition(" ")
    if ours == "bft" and device != "cpu":
        probe = torch.empty(1, 1, device=device)
        return "; ".join(why_not(backend, probe, probe))
    return ""
