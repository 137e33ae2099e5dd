"""What is compared: one function each, from a problem to the mean loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.shapes import Problem
from bft_kernels import balanced_linear_cross_entropy, linear_cross_entropy

Provider = Callable[[Problem], Tensor]


def eager(problem: Problem) -> Tensor:
    """All logits at once."""
    logits = functional.linear(problem.hidden, problem.weight)
    return functional.cross_entropy(logits.float(), problem.target)


def torch_chunked(problem: Problem) -> Tensor:
    """PyTorch's own chunked loss, of torch 2.13 on, with its default choice of chunks."""
    return functional.linear_cross_entropy(
        problem.hidden,
        problem.weight,
        problem.target,
        options=torch.nn.LinearCrossEntropyOptions(),
    )


def exact(problem: Problem) -> Tensor:
    """Ours, with the exact gradient."""
    loss = linear_cross_entropy(problem.hidden, problem.weight, problem.target)
    assert isinstance(loss, Tensor)
    return loss


def sampled(problem: Problem) -> Tensor:
    """Ours, with the sampled gradient at its default ``eps``."""
    loss = linear_cross_entropy(
        problem.hidden, problem.weight, problem.target, gradient="sampled", seed=0
    )
    assert isinstance(loss, Tensor)
    return loss


def balanced(problem: Problem) -> Tensor:
    """The BFT loss over documents of 128 tokens."""
    count = problem.target.numel()
    bounds = torch.tensor([*range(0, count, 128), count])
    loss = balanced_linear_cross_entropy(
        problem.hidden, problem.weight, problem.target, cu_seqlens=bounds
    )
    assert isinstance(loss, Tensor)
    return loss


PROVIDERS: dict[str, Provider] = {
    "eager": eager,
    **({"torch chunked": torch_chunked} if hasattr(functional, "linear_cross_entropy") else {}),
    "bft exact": exact,
    "bft balanced": balanced,
    "bft sampled": sampled,
}
