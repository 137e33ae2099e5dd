"""Who is compared: what each provider can compute, what it costs, and why it cannot run here."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.providers import losses
from benchmarks.providers.losses import WEIGHTINGS, Run, ours
from benchmarks.results.schema import ABSENT, version
from benchmarks.shapes import Problem
from bft_kernels.dispatch import why_not as backend_why_not

# forward: no gradients. both: dH and dW. frozen: dH, of a head that is not trained (LoRA).
MODES = ("forward", "both", "frozen")
SAMPLED: dict[str, Any] = {"gradient": "sampled", "seed": 0}
EPS = 2**-12  # the default of the sampled gradient
MIB = 2**20

_NONE: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Provider:
    """One loss to compare."""

    name: str
    # Ways to run it by name; of several the fastest here is reported.
    options: Mapping[str, Run]
    # Products that the method must do in each of MODES, in G: of the mean, and of a weighted loss.
    plain: tuple[int, int, int]
    weighted: tuple[int, int, int]
    weightings: tuple[str, ...] = WEIGHTINGS
    refused: Mapping[str, str] = field(default_factory=lambda: _NONE)  # modes, and why
    distribution: str = ""  # that it is installed from
    module: str = ""  # what must be importable
    gpu_only: bool = False
    compiles: bool = False  # is slow to start
    backend: str = ""  # of this package
    sampled: bool = False

    def products(self, weighting: str, mode: str) -> int:
        """In G."""
        return (self.plain if weighting == "plain" else self.weighted)[MODES.index(mode)]


@dataclass(frozen=True)
class Case:
    """What one row of the results is about."""

    provider: str
    weighting: str = "plain"
    mode: str = "both"
    option: str = ""  # one of the provider's; empty: its first

    def __call__(self, problem: Problem) -> Tensor:
        """The loss ``[]``."""
        options = PROVIDERS[self.provider].options
        run = options[self.option or next(iter(options))]
        if self.mode == "forward":
            with torch.no_grad():
                return run(problem, self.weighting)
        return run(problem.frozen() if self.mode == "frozen" else problem, self.weighting)

    @property
    def products(self) -> int:
        return PROVIDERS[self.provider].products(self.weighting, self.mode)


def _one(run: Run) -> dict[str, Run]:
    return {"": run}


def _ours(backend: str) -> list[Provider]:
    """Both gradients of a backend, and the exact one with other budgets where that matters."""
    name = f"bft {backend}"
    # An exact weighted loss whose documents do not fit the budget computes up to 1G again.
    exact = (1, 4, 3) if backend == "cuda" else (1, 3, 2)  # that one keeps no logits
    same = {"forward": f"its forward is that of {name} exact"}
    budgets = (16, 256) if backend == "cpu" else ()
    how: dict[str, Any] = {"backend": backend}
    return [
        Provider(
            f"{name} exact", _one(functools.partial(ours, **how)), exact, exact, backend=backend
        ),
        *(
            Provider(
                f"{name} exact, {budget} MiB",
                _one(functools.partial(ours, max_buffer_bytes=budget * MIB, **how)),
                exact,
                exact,
                refused=same,
                backend=backend,
            )
            for budget in budgets
        ),
        Provider(
            f"{name} sampled",
            _one(functools.partial(ours, eps=EPS, **SAMPLED, **how)),
            (1, 1, 1),
            (1, 1, 1),
            refused=same,
            backend=backend,
            sampled=True,
        ),
    ]


_LIST = [
    Provider("eager", _one(losses.eager), (1, 3, 2), (1, 3, 2)),
    Provider("compiled eager", _one(losses.compiled), (1, 3, 2), (1, 3, 2), compiles=True),
    Provider(
        "torch chunked",
        {
            "auto": losses.torch_chunked,
            **{
                f"{rows} rows": functools.partial(
                    losses.torch_chunked, chunking_method=None, batch_chunk_size=rows
                )
                for rows in (256, 512, 1024)
            },
        },
        (1, 3, 2),
        (1, 4, 3),
    ),
    Provider(
        "cut-cross-entropy",
        _one(losses.cut_cross_entropy),
        (1, 3, 2),
        (1, 3, 2),
        distribution="cut-cross-entropy",
        module="cut_cross_entropy",
        compiles=True,
    ),
    Provider(
        "liger chunked",
        _one(losses.liger_chunked),
        (1, 4, 3),
        (1, 4, 3),
        distribution="liger-kernel",
        module="liger_kernel.chunked_loss.fused_linear_ppo",
    ),
    Provider(
        "liger scaled",
        _one(losses.liger_scaled),
        (1, 4, 4),
        (1, 4, 4),
        distribution="liger-kernel",
        module="liger_kernel.ops.fused_linear_scaled_cross_entropy",
    ),
    Provider(
        "liger fused",
        _one(losses.liger_fused),
        (1, 3, 2),
        (1, 4, 3),
        distribution="liger-kernel",
        module="liger_kernel.transformers",
        gpu_only=True,
    ),
    Provider(
        "trl",
        _one(losses.trl_chunked),
        (1, 4, 3),
        (1, 4, 3),
        distribution="trl",
        module="trl.kernels.chunked_logprob",
    ),
    Provider(
        "verl",
        _one(losses.verl_chunked),
        (1, 4, 4),
        (1, 4, 4),
        distribution="verl",
        module="verl.utils.experimental.torch_functional",
    ),
    Provider(
        "quack",
        _one(losses.quack),
        (1, 3, 2),
        (1, 3, 2),
        weightings=("plain",),
        distribution="quack-kernels",
        module="quack.linear_cross_entropy",
        gpu_only=True,
    ),
    *(provider for backend in ("cpu", "triton", "cuda", "torch") for provider in _ours(backend)),
]
PROVIDERS: dict[str, Provider] = {provider.name: provider for provider in _LIST}


def cases(names: Sequence[str], weightings: Sequence[str], modes: Sequence[str]) -> list[Case]:
    """Every combination, weighted compared with weighted: in the order of the tables.

    Raises:
        ValueError: a name that is none.
    """
    known = {"providers": PROVIDERS, "weightings": WEIGHTINGS, "modes": MODES}
    for argument, got in {"providers": names, "weightings": weightings, "modes": modes}.items():
        for name in got:
            if name not in known[argument]:
                expected = ", ".join(known[argument])
                raise ValueError(f"{argument}: got {name!r}, expected some of {expected}")
    return [
        Case(name, weighting, mode) for weighting in weightings for mode in modes for name in names
    ]


def why_absent(name: str, distribution: str) -> str:
    """What is not there for a provider that is installed from ``distribution``, if from any."""
    if distribution and version(distribution) == ABSENT:
        return f"{distribution} is {ABSENT}"
    if name == "torch chunked" and not hasattr(functional, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no linear_cross_entropy; it came with 2.13"
    return ""


def why_not(case: Case, device: str, dtype: torch.dtype) -> str:
    """Why it cannot run here, as far as that shows without running it; empty if it can."""
    provider = PROVIDERS[case.provider]
    if case.weighting not in provider.weightings:
        return f"it computes {' and '.join(provider.weightings)} only, no losses of tokens to weigh"
    if case.mode in provider.refused:
        return provider.refused[case.mode]
    reason = why_absent(provider.name, provider.distribution)
    if reason:
        return reason
    if provider.gpu_only and device == "cpu":
        return "it runs on a GPU only"
    if provider.module:
        try:
            importlib.import_module(provider.module)
        except ImportError as error:
            return f"{provider.distribution} is installed, but cannot be imported: {error}"
    if provider.backend:
        probe = torch.empty(1, 1, device=device, dtype=dtype)
        reasons = backend_why_not(provider.backend, probe, probe)
        # One tensor stands for both: what is wrong with it is said of hidden already.
        return "; ".join(one for one in reasons if not one.startswith("weight "))
    return ""
