"""The list of providers, ours included; the cases to measure, and why one cannot run here."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.providers.losses import ours, weigh
from benchmarks.providers.provider import AGAIN, KEPT, MODES, PEERS, WEIGHTINGS, Provider
from benchmarks.results.environment import ABSENT, version
from benchmarks.shapes import Problem
from bft_kernels.dispatch import why_not as backend_why_not

SAMPLED: dict[str, Any] = {"gradient": "sampled", "seed": 0}


@dataclass(frozen=True)
class Case:
    """What one row of the results measures."""

    provider: str
    weighting: str = "plain"
    mode: str = "both"
    option: str = ""  # one of the provider's; empty for its first

    def __call__(self, problem: Problem) -> Tensor:
        """Computes the loss ``[]``."""
        options = find(self.provider).options
        run = options[self.option or next(iter(options))]
        problem = problem.frozen() if self.mode == "frozen" else problem
        with torch.set_grad_enabled(self.mode != "forward"):
            return weigh(run(problem, self.weighting), self.weighting, problem)

    def __str__(self) -> str:
        return f"{self.provider}, {self.weighting}, {self.mode}"

    @property
    def columns(self) -> dict[str, str]:
        """The columns that name the case in a row of results."""
        return {"provider": self.provider, "weighting": self.weighting, "mode": self.mode}

    @property
    def products(self) -> int:
        return find(self.provider).products(self.weighting, self.mode)


def _ours(backend: str) -> list[Provider]:
    """A backend's exact and sampled gradients, and its other rows."""
    # If its documents do not fit the budget, an exact weighted loss computes up to 1G again.
    exact = AGAIN if backend == "cuda" else KEPT

    def one(label: str, modes: tuple[str, ...] = ("both", "frozen"), **how: Any) -> Provider:
        eps = how.get("eps")
        return Provider(
            f"bft {backend} {label}",
            {"": functools.partial(ours, backend=backend, **how)},
            plain=(1, 1, 1) if eps else exact,
            weighted=(1, 1, 1) if eps else exact,
            modes=modes,
            backend=backend,
            eps=eps,
            allowed=0.2 if eps else 0.05,
            priority={"triton": 0, "cuda": 1}.get(backend, 2),
        )

    found = [one("exact", MODES), one("sampled", eps=2.0**-12, **SAMPLED)]
    if backend == "cpu":
        found[1:1] = [one(f"exact, {mib} MiB", max_buffer_bytes=mib * 2**20) for mib in (16, 256)]
    if backend in ("triton", "cuda"):
        found += [one(f"sampled 2^-{power}", eps=2.0**-power, **SAMPLED) for power in (10, 8)]
        found.append(one("no statistics", ("forward",), return_stats=False))
    return found


_BACKENDS = ("cpu", "triton", "cuda", "torch")
PROVIDERS: dict[str, Provider] = {
    one.name: one for one in (*PEERS, *(one for name in _BACKENDS for one in _ours(name)))
}


def find(name: str) -> Provider:
    """The provider of this name, or your own loss as ``module:function``; or else ValueError."""
    if name in PROVIDERS:
        return PROVIDERS[name]
    module, separator, function = name.partition(":")
    if not separator:
        names = ", ".join(PROVIDERS)
        raise ValueError(f"providers: got {name!r}, expected module:function or some of {names}")

    def run(problem: Problem, weighting: str) -> Tensor:
        return getattr(importlib.import_module(module), function)(problem)

    return Provider(name, {"": run}, KEPT, KEPT, ("plain",), priority=0)


def cases(names: Sequence[str], weightings: Sequence[str], modes: Sequence[str]) -> list[Case]:
    """Every combination in the order of the tables; ValueError for an unknown name."""
    for name in names:
        find(name)
    for argument, got, known in (("weightings", weightings, WEIGHTINGS), ("modes", modes, MODES)):
        if unknown := [name for name in got if name not in known]:
            expected = ", ".join(known)
            raise ValueError(f"{argument}: got {unknown[0]!r}, expected some of {expected}")
    return [
        Case(name, weighting, mode) for weighting in weightings for mode in modes for name in names
    ]


def telling_cases(names: Sequence[str]) -> list[Case]:
    """Cases if time is short, important ones first: ours balanced in every mode, peers' means."""
    found = []
    for provider in sorted(map(find, names), key=lambda one: one.priority):
        modes = ("both", "frozen", "forward") if provider.backend else ("both",)
        weighting = "bft" if provider.backend else "plain"
        found += [Case(provider.name, weighting, mode) for mode in modes if mode in provider.modes]
    return found


def why_not_at_all(case: Case, device: str) -> str:
    """Why it cannot run on a kind of device, as far as one can tell without importing anything."""
    provider = find(case.provider)
    if case.weighting not in provider.weightings:
        return f"it computes {' and '.join(provider.weightings)} only, no losses of tokens to weigh"
    if case.mode not in provider.modes:
        return f"for {case.mode} see {provider.family} exact"
    if provider.distribution and version(provider.distribution) == ABSENT:
        return f"{provider.distribution} is {ABSENT} (pip install {provider.distribution})"
    if provider.name == "torch chunked" and not hasattr(functional, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no linear_cross_entropy; it came with 2.13"
    if provider.gpu_only and device == "cpu":
        return "it runs on a GPU only"
    return ""


def why_not(case: Case, device: str, dtype: torch.dtype) -> str:
    """Why it cannot run here, as far as one can tell without running it; empty if it can."""
    provider, reason = find(case.provider), why_not_at_all(case, device)
    if reason:
        return reason
    if provider.module:
        try:
            importlib.import_module(provider.module)
        except ImportError as error:
            return f"{provider.distribution} is installed, but cannot be imported: {error}"
    if provider.backend:
        probe = torch.empty(1, 1, device=device, dtype=dtype)
        reasons = backend_why_not(provider.backend, probe, probe)
        # One tensor stands for both, so its faults are said once, of hidden.
        return "; ".join(one for one in reasons if not one.startswith("weight "))
    return ""
