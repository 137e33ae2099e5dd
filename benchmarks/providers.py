"""What is compared: one function each, from a problem to the mean loss."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.shapes import Problem
from bft_kernels import balanced_linear_cross_entropy, linear_cross_entropy, token_weights

Provider = Callable[[Problem], Tensor]


def eager(problem: Problem) -> Tensor:
    """All logits at once."""
    logits = functional.linear(problem.hidden, problem.weight)
    return functional.cross_entropy(logits.float(), problem.target)


def torch_chunked(problem: Problem, *, rows: int | None = None) -> Tensor:
    """PyTorch's own chunked loss (torch 2.13); without ``rows`` by its own choice of chunks."""
    options = torch.nn.LinearCrossEntropyOptions
    how = options() if rows is None else options(chunking_method=None, batch_chunk_size=rows)
    return functional.linear_cross_entropy(
        problem.hidden, problem.weight, problem.target, options=how
    )


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(functional.linear(hidden, weight).float(), target)

    return torch.compile(loss)


def compiled(problem: Problem) -> Tensor:
    """Eager, compiled."""
    return _compiled()(problem.hidden, problem.weight, problem.target)


def cut_cross_entropy(problem: Problem) -> Tensor:
    """Apple's; off a GPU its implementation for torch.compile."""
    from cut_cross_entropy import linear_cross_entropy as cce

    how = "cce" if problem.hidden.is_cuda else "torch_compile"
    return cce(problem.hidden, problem.weight, problem.target, impl=how)


def trl_chunked(problem: Problem) -> Tensor:
    """TRL's log-probabilities in chunks, as its SFTTrainer calls them, without statistics."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    log_probabilities = ChunkedLogProbFunction.apply(
        problem.hidden,
        problem.weight,
        None,  # bias
        problem.target,
        1.0,  # temperature
        _CHUNKED_LOGPROB_CHUNK_SIZE,
        None,  # softcap
        1.0,  # scale
        (),  # no entropy, no accuracy
    )[0]
    return -log_probabilities.mean()


def liger_chunked(problem: Problem) -> Tensor:
    """Liger's log-probabilities in chunks: its one linear loss that runs without a GPU."""
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    log_probabilities = LigerFusedLinearPPOBase.chunk_forward(
        problem.hidden[None], problem.weight, problem.target[None]
    )
    return -log_probabilities.mean()


def ours(problem: Problem, *, frozen: bool = False, **how: Any) -> Tensor:
    """The plain mean."""
    weight = problem.weight.detach() if frozen else problem.weight
    loss = linear_cross_entropy(problem.hidden, weight, problem.target, **how)
    assert isinstance(loss, Tensor)
    return loss


def _documents(problem: Problem) -> Tensor:
    """Boundaries of documents of 128 tokens."""
    count = problem.target.numel()
    return torch.tensor([*range(0, count, 128), count])


def balanced(problem: Problem, *, frozen: bool = False, **how: Any) -> Tensor:
    """The BFT loss over documents of 128 tokens."""
    weight = problem.weight.detach() if frozen else problem.weight
    loss = balanced_linear_cross_entropy(
        problem.hidden, weight, problem.target, cu_seqlens=_documents(problem), **how
    )
    assert isinstance(loss, Tensor)
    return loss


@torch.no_grad()
def _forward_only(problem: Problem) -> Tensor:
    """The loss with every statistic."""
    loss, _ = balanced_linear_cross_entropy(
        problem.hidden,
        problem.weight,
        problem.target,
        cu_seqlens=_documents(problem),
        return_stats=True,
    )
    return loss


def _weighting(problem: Problem) -> Tensor:
    """Token and sequence weights alone, of documents of 128 tokens."""
    confidence = torch.linspace(0, 1, problem.target.numel(), device=problem.target.device)
    return token_weights(confidence, _documents(problem)).token_weight


SAMPLED: dict[str, Any] = {"gradient": "sampled", "seed": 0}
MIB = 2**20

PROVIDERS: dict[str, Provider] = {
    "eager": eager,
    **({"torch chunked": torch_chunked} if hasattr(functional, "linear_cross_entropy") else {}),
    "bft exact": ours,
    "bft sampled": functools.partial(ours, **SAMPLED),
    "bft balanced": balanced,
    "bft balanced, 256 MiB": functools.partial(balanced, max_buffer_bytes=256 * MIB),
    "bft balanced, 16 MiB": functools.partial(balanced, max_buffer_bytes=16 * MIB),
    "bft balanced sampled": functools.partial(balanced, **SAMPLED),
    "bft balanced, frozen head": functools.partial(balanced, frozen=True),
    "bft balanced sampled, frozen head": functools.partial(balanced, frozen=True, **SAMPLED),
    "bft balanced, no_grad": _forward_only,
    "bft weighting": _weighting,
}
# Slow to start, or installed apart (pip install --no-deps): asked for by name.
PEERS: dict[str, Provider] = {
    "compiled eager": compiled,
    "cut-cross-entropy": cut_cross_entropy,
    "trl": trl_chunked,
    "liger": liger_chunked,
    **(
        {"torch chunked, 1024 rows": functools.partial(torch_chunked, rows=1024)}
        if hasattr(functional, "linear_cross_entropy")
        else {}
    ),
}
