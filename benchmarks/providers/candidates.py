"""What ``python -m benchmarks gpu`` compares: this package's GPU backends and all peers."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.providers import losses
from benchmarks.providers.registry import SAMPLED, why_absent
from benchmarks.shapes import Problem


@dataclass(frozen=True)
class Candidate:
    """One loss to measure."""

    name: str
    family: str  # those of one family share a process
    run: Callable[[Problem], Tensor]
    balanced: bool = False  # the loss is BFT's, not the plain mean
    eps: float | None = None  # of a sampled gradient
    allowed: float = 0.2  # relative error that passes for rounding, sampling or filtering
    distribution: str | None = None  # that it is installed from
    gpu_only: bool = False
    weight: int = 1  # share of the time


def _balanced(problem: Problem, *, frozen: bool = False, **how: Any) -> Tensor:
    """The BFT loss over documents of 128 tokens."""
    return losses.ours(problem.frozen() if frozen else problem, "bft", **how)


@torch.no_grad()
def _forward(problem: Problem, backend: str) -> Tensor:
    return _balanced(problem, backend=backend, return_stats=False)


def _modes(
    backend: str, powers: tuple[int, ...], weight: int, *, gpu_only: bool = False
) -> list[Candidate]:
    """Exact and sampled with each ``2^-power``, with a trained and a frozen head, and forward."""
    family = f"bft {backend}"

    def mode(label: str, frozen: bool, **how: Any) -> Candidate:
        return Candidate(
            f"{family} {label}{', frozen head' if frozen else ''}",
            family,
            functools.partial(_balanced, backend=backend, frozen=frozen, **how),
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
    name: str,
    run: losses.Run,
    distribution: str | None = None,
    *,
    family: str = "",
    gpu_only: bool = False,
    **how: Any,
) -> Candidate:
    mean = functools.partial(run, weighting="plain", **how)
    return Candidate(name, family or name, mean, distribution=distribution, gpu_only=gpu_only)


# In order of importance, except that the last two compile or tune for long: they get what is left.
CANDIDATES = (
    *_modes("triton", (12, 10, 8), weight=2),
    *_modes("cuda", (12, 10, 8), weight=1, gpu_only=True),
    _peer("eager", losses.eager),
    _peer("liger fused", losses.liger_fused, "liger-kernel"),
    _peer("cut-cross-entropy", losses.cut_cross_entropy, "cut-cross-entropy", gpu_only=True),
    _peer("torch chunked", losses.torch_chunked),
    _peer(
        "torch chunked, 1024 rows",
        losses.torch_chunked,
        family="torch chunked",
        chunking_method=None,
        batch_chunk_size=1024,
    ),
    *_modes("torch", (12,), weight=1),
    _peer("trl", losses.trl_chunked, "trl"),
    _peer("compiled eager", losses.compiled),
    _peer("quack", losses.quack, "quack-kernels", gpu_only=True),
)


def _imported(module: str, function: str, problem: Problem) -> Tensor:
    loss: Tensor = getattr(importlib.import_module(module), function)(problem)
    return loss


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
    run = functools.partial(_imported, module, function)
    return Candidate(name, name, run)


def why_missing(candidate: Candidate, device: str, reasons: Mapping[str, str]) -> str:
    """Why it cannot run here, as far as that shows without running it; empty if it can.

    ``reasons`` are those of our backends.
    """
    reason = why_absent(candidate.family, candidate.distribution or "")
    if reason:
        return reason
    if candidate.gpu_only and device == "cpu":
        return "it runs on a GPU only"
    ours, _, backend = candidate.family.partition(" ")
    if ours == "bft" and device != "cpu":
        return reasons.get(backend, "")
    return ""
