"""Errors of losses and gradients, and the expected error of a sampled gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.measure.timing import step
from benchmarks.providers.losses import weigh
from benchmarks.providers.registry import SAMPLED, Case, find
from benchmarks.shapes import Problem
from bft_kernels import linear_nll

ROWS = 64
_BLOCK = 8192  # rows of a gradient that are compared at a time


def relative_error(got: Tensor, expected: Tensor) -> float:
    """``|got - expected| / |expected|``, summed in float64 over blocks of rows."""
    off = expected.new_zeros((), dtype=torch.float64)
    norm = off.clone()
    blocks = (torch.atleast_1d(one).split(_BLOCK) for one in (got, expected))
    for mine, theirs in zip(*blocks, strict=True):
        off += (mine.to(theirs.device).double() - theirs.double()).square().sum()
        norm += theirs.double().square().sum()
    return float(off.sqrt() / norm.sqrt().clamp_min(1e-30))


def first_rows(problem: Problem, rows: int = ROWS) -> Problem:
    """The problem's first tokens with the whole head."""
    hidden = problem.hidden.detach()[:rows].clone().requires_grad_()
    return replace(problem, hidden=hidden, target=problem.target[:rows])


# The rows of dH that are compared, and those of dW in groups; the worst group's error counts.
Rows = tuple[slice | Tensor, tuple[slice | Tensor, ...]]
EVERYTHING: Rows = (slice(None), (slice(None),))


def some_rows(problem: Problem) -> Rows:
    """About 64 tokens, frequent ids and the rarest targets; ids are in order of rank."""
    every = max(1, problem.target.numel() // 64)
    return slice(None, None, every), (slice(64), problem.target.unique()[-64:])


@dataclass(frozen=True)
class Truth:
    """A problem's exact loss, and rows of its gradients."""

    loss: Tensor  # []
    hidden: Tensor  # [N, D], or only the rows that are compared
    weight: tuple[Tensor, ...]  # [V, D], or only the rows that are compared, in groups
    coefficient: Tensor  # [N], the factor of each nll by the weighting
    rows: Rows


def truth(
    problem: Problem, weighting: str, dtype: torch.dtype = torch.float64, rows: Rows = EVERYTHING
) -> Truth:
    """Computes the truth by the torch backend, which is tested against the specification.

    In float64 it takes ``16 V D`` bytes; if only some rows are compared, the CPU keeps a copy.
    """
    hidden = problem.hidden.detach().to(dtype).requires_grad_()
    weight = problem.weight.detach().to(dtype).requires_grad_()
    nll = linear_nll(hidden, weight, problem.target, backend="torch")
    leaf = nll.detach().requires_grad_()
    loss = weigh(leaf, weighting, problem)
    (coefficient,) = torch.autograd.grad(loss, leaf)
    nll.backward(coefficient)
    device = hidden.device if rows is EVERYTHING else torch.device("cpu")
    groups = tuple(weight.grad[group].to(device) for group in rows[1])
    parts = hidden.grad[rows[0]].to(device), groups
    return Truth(loss.detach().to(device), *parts, coefficient, rows)


def step_errors(case: Case, problem: Problem, expected: Truth) -> dict[str, float]:
    """The relative errors of a step's loss and of the gradients that it makes."""
    found = {"error_loss": relative_error(step(case, problem), expected.loss)}
    hidden, weight = problem.hidden.grad, problem.weight.grad
    if hidden is not None:
        found["error_hidden"] = relative_error(hidden[expected.rows[0]], expected.hidden)
    if weight is not None:
        pairs = zip(expected.rows[1], expected.weight, strict=True)
        found["error_weight"] = max(relative_error(weight[rows], true) for rows, true in pairs)
    problem.hidden.grad = problem.weight.grad = None
    return found


@torch.no_grad()
def certificate(case: Case, problem: Problem, expected: Truth) -> dict[str, float]:
    """The expected error of a sampled step's gradients, relative to all of the exact ones."""
    provider = find(case.provider)
    if provider.eps is None or case.mode == "forward":
        return {}
    how = {"eps": provider.eps, "backend": provider.backend, "hidden_variance": True}
    _, stats = linear_nll(*problem.inputs, return_stats=True, **how, **SAMPLED)
    squared = expected.coefficient.square()
    hidden = (squared * stats.hidden_variance).sum().sqrt()
    found = {"certificate_hidden": float(hidden / expected.hidden.norm().clamp_min(1e-30))}
    if case.mode == "both":
        norms = problem.hidden.double().square().sum(1)
        weight = (squared * stats.variance * norms).sum().sqrt()
        found["certificate_weight"] = float(weight / expected.weight[0].norm().clamp_min(1e-30))
    return found
