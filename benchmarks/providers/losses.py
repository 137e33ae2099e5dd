"""The losses that are compared: one function each, from a problem and a weighting to a scalar."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.shapes import Problem
from bft_kernels import balanced_linear_cross_entropy, linear_cross_entropy
from bft_kernels.config import Weighting
from bft_kernels.token_stats import BalancedTokenStats, TokenStats
from bft_kernels.weighting import balanced_loss

Run = Callable[..., Tensor]  # of a Problem and its weighting

# plain: the mean. dft: the mean of confidence x nll. bft: balanced, over documents. The confidence
# and the weights are constants to the gradient.
WEIGHTINGS = ("plain", "dft", "bft")


def documents(problem: Problem) -> Tensor:
    """Boundaries of the problem's documents, ``[S + 1]``, on the CPU."""
    count = problem.target.numel()
    return torch.tensor([*range(0, count, problem.document), count])


def weigh(nll: Tensor, weighting: str, problem: Problem) -> Tensor:
    """The weighted loss from each token's ``nll [N]``; for ``plain`` a mean ``[]`` will do."""
    if nll.dtype != torch.float64:
        nll = nll.float()
    if weighting == "plain":
        return nll.mean()
    if weighting == "dft":
        return ((-nll.detach()).exp() * nll).mean()
    settings = Weighting(weighting, problem.window)
    return balanced_loss(
        nll,
        torch.ones_like(nll, dtype=torch.bool),
        documents(problem),
        None,
        "sequence",
        settings.scheme,
        settings.window,
        settings.gamma,
        settings.floor,
    ).loss


def reduction(weighting: str) -> str:
    """What to ask of a loss that can reduce: its own mean, or the tokens' losses to weigh."""
    return "mean" if weighting == "plain" else "none"


def ours(problem: Problem, weighting: str, **how: Any) -> Tensor:
    """This package's; without gradients with every statistic, as an evaluation wants them."""
    inputs = problem.hidden, problem.weight, problem.target
    how.setdefault("return_stats", not torch.is_grad_enabled())
    result: Tensor | tuple[Tensor, TokenStats | BalancedTokenStats]
    if weighting == "plain":
        result = linear_cross_entropy(*inputs, **how)
    elif weighting == "dft":
        result = balanced_linear_cross_entropy(*inputs, scheme="dft", normalize="token", **how)
    else:
        how["cu_seqlens"] = documents(problem)
        result = balanced_linear_cross_entropy(*inputs, scheme=weighting, **how)
    return result if isinstance(result, Tensor) else result[0]


def eager(problem: Problem, weighting: str) -> Tensor:
    """All logits at once."""
    nll = _eager(problem.hidden, problem.weight, problem.target, reduction(weighting))
    return weigh(nll, weighting, problem)


def _eager(hidden: Tensor, weight: Tensor, target: Tensor, how: str) -> Tensor:
    logits = functional.linear(hidden, weight)
    return functional.cross_entropy(logits.float(), target, reduction=how)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_eager)


def compiled(problem: Problem, weighting: str) -> Tensor:
    """Eager, compiled; its weights are not."""
    nll = _compiled()(problem.hidden, problem.weight, problem.target, reduction(weighting))
    return weigh(nll, weighting, problem)


def torch_chunked(problem: Problem, weighting: str, **options: Any) -> Tensor:
    """PyTorch's own chunked loss (torch 2.13)."""
    nll = functional.linear_cross_entropy(
        problem.hidden,
        problem.weight,
        problem.target,
        reduction=reduction(weighting),
        options=torch.nn.LinearCrossEntropyOptions(**options),
    )
    return weigh(nll, weighting, problem)


def cut_cross_entropy(problem: Problem, weighting: str) -> Tensor:
    """Apple's; off a GPU its implementation for torch.compile."""
    from cut_cross_entropy import linear_cross_entropy as cce

    nll = cce(
        problem.hidden,
        problem.weight,
        problem.target,
        impl="cce" if problem.hidden.is_cuda else "torch_compile",
        reduction=reduction(weighting),
    )
    return weigh(nll, weighting, problem)


def liger_chunked(problem: Problem, weighting: str) -> Tensor:
    """Liger's log-probabilities in chunks of the vocabulary, in plain torch."""
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    log_probabilities = LigerFusedLinearPPOBase.chunk_forward(
        problem.hidden[None], problem.weight, problem.target[None]
    )[0]
    return weigh(-log_probabilities, weighting, problem)


def liger_scaled(problem: Problem, weighting: str) -> Tensor:
    """Liger's scaled cross-entropy: its kernels on Hopper, elsewhere verl's formulas in torch."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    nll = LigerFusedLinearScaledCrossEntropyFunction.apply(
        problem.hidden, problem.weight, problem.target
    )
    return weigh(nll, weighting, problem)


def liger_fused(problem: Problem, weighting: str) -> Tensor:
    """Liger's fused linear cross-entropy; DFT is an option of its own."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    how = {"use_token_scaling": True} if weighting == "dft" else {}
    fused = LigerFusedLinearCrossEntropyLoss(
        reduction="none" if weighting == "bft" else "mean", **how
    )
    nll: Tensor = fused(problem.weight, problem.hidden, problem.target)
    return weigh(nll, "plain" if weighting == "dft" else weighting, problem)


def trl_chunked(problem: Problem, weighting: str) -> Tensor:
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
    return weigh(-log_probabilities, weighting, problem)


def verl_chunked(problem: Problem, weighting: str) -> Tensor:
    """The fused linear layer for PPO of verl: log-probabilities in chunks of 512 tokens."""
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    log_probabilities, _ = FusedLinearForPPO()(problem.hidden, problem.weight, problem.target)
    return weigh(-log_probabilities, weighting, problem)


def quack(problem: Problem, weighting: str) -> Tensor:
    """QuACK's chunked linear cross-entropy, by its own choice of pipeline."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    loss: Tensor = chunked_linear_cross_entropy(problem.hidden, problem.weight, problem.target)
    return weigh(loss, weighting, problem)
