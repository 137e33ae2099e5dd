"""How far gradients are from float64's, and what the certificate of a sampled one promises."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.measure.timing import step
from benchmarks.providers.losses import weigh
from benchmarks.providers.registry import EPS, PROVIDERS, SAMPLED, Case
from benchmarks.shapes import Problem
from bft_kernels import linear_nll

ROWS = 64
_BLOCK = 8192  # rows of a gradient compared at a time


def relative_error(got: Tensor, expected: Tensor) -> float:
    """``|got - expected| / |expected|``, summed in float64 over blocks of rows."""
    off = expected.new_zeros((), dtype=torch.float64)
    norm = off.clone()
    blocks = (torch.atleast_1d(one).split(_BLOCK) for one in (got, expected))
    for mine, theirs in zip(*blocks, strict=True):
        off += (mine.double() - theirs.double()).square().sum()
        norm += theirs.double().square().sum()
    return float(off.sqrt() / norm.sqrt().clamp_min(1e-30))


def first_rows(problem: Problem, rows: int = ROWS) -> Problem:
    """Its first tokens with the whole head."""
    hidden = problem.hidden.detach()[:rows].clone().requires_grad_()
    return replace(problem, hidden=hidden, target=problem.target[:rows])


@dataclass(frozen=True)
class Truth:
    """Gradients of a problem in float64."""

    weighting: str
    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    coefficient: Tensor  # [N], what the weighting multiplies each nll by


def truth(problem: Problem, weighting: str) -> Truth:
    """By the torch backend, itself tested against the specification; takes ``16 V D`` bytes."""
    hidden = problem.hidden.detach().double().requires_grad_()
    weight = problem.weight.detach().double().requires_grad_()
    nll = linear_nll(hidden, weight, problem.target, backend="torch")
    assert isinstance(nll, Tensor)
    leaf = nll.detach().requires_grad_()
    (coefficient,) = torch.autograd.grad(weigh(leaf, weighting, problem), leaf)
    nll.backward(coefficient)
    assert hidden.grad is not None
    assert weight.grad is not None
    return Truth(weighting, hidden.grad, weight.grad, coefficient)


def gradient_errors(case: Case, problem: Problem, expected: Truth) -> dict[str, float]:
    """``error_hidden`` and ``error_weight``; of a sampled gradient what is certified for both."""
    if case.mode == "forward":
        return {}
    step(case, problem)
    found: dict[str, float] = {}
    for name in ("hidden", "weight"):
        gradient = getattr(problem, name).grad
        if gradient is not None:
            found[f"error_{name}"] = relative_error(gradient, getattr(expected, name))
    problem.hidden.grad = problem.weight.grad = None
    if PROVIDERS[case.provider].sampled:
        promised = _certificate(case, problem, expected)
        found |= {
            f"certificate_{name}": value
            for name, value in promised.items()
            if f"error_{name}" in found
        }
    return found


@torch.no_grad()
def _certificate(case: Case, problem: Problem, expected: Truth) -> dict[str, float]:
    """The expected error of both gradients, relative to the exact ones."""
    _, stats = linear_nll(
        problem.hidden,
        problem.weight,
        problem.target,
        eps=EPS,
        **SAMPLED,
        backend=PROVIDERS[case.provider].backend,
        return_stats=True,
        hidden_variance=True,
    )
    assert stats.variance is not None
    assert stats.hidden_variance is not None
    squared = expected.coefficient.square()
    norms = problem.hidden.double().square().sum(1)
    hidden = (squared * stats.hidden_variance).sum().sqrt()
    weight = (squared * stats.variance * norms).sum().sqrt()
    return {
        "hidden": float(hidden / expected.hidden.norm().clamp_min(1e-30)),
        "weight": float(weight / expected.weight.norm().clamp_min(1e-30)),
    }
