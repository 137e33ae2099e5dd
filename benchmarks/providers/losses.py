"""The losses that are compared: each is a function of a problem and a weighting.

It returns the loss, or each token's ``nll``, which is then weighted. To add a peer, write such a
function with ``peer`` above it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.providers.provider import AGAIN, AGAIN_EACH, KEPT, peer
from benchmarks.shapes import Problem
from bft_kernels import balanced_linear_cross_entropy, linear_cross_entropy
from bft_kernels.settings import Settings
from bft_kernels.weighting import balanced_loss


def documents(problem: Problem) -> Tensor:
    """The boundaries of the problem's documents, ``[S + 1]``, on the CPU."""
    count = problem.target.numel()
    return torch.tensor([*range(0, count, problem.document), count])


def weigh(nll: Tensor, weighting: str, problem: Problem) -> Tensor:
    """The loss ``[]`` from each token's ``nll [N]``; a reduced loss stays as it is."""
    if nll.dtype != torch.float64:
        nll = nll.float()
    if nll.ndim == 0 or weighting == "plain":
        return nll.mean()
    if weighting == "dft":
        return ((-nll.detach()).exp() * nll).mean()
    settings = Settings(scheme=weighting, window=problem.window)
    labelled = torch.ones_like(nll, dtype=torch.bool)
    return balanced_loss(nll, labelled, documents(problem), None, settings).loss


def reduction(weighting: str) -> str:
    """The reduction to ask for: the loss's own mean, or none if tokens' losses are weighted."""
    return "mean" if weighting == "plain" else "none"


def ours(problem: Problem, weighting: str, **how: Any) -> Tensor:
    """This package's losses; without gradients they give every statistic, as for an evaluation."""
    how.setdefault("return_stats", not torch.is_grad_enabled())
    if weighting == "plain":
        result = linear_cross_entropy(*problem.inputs, **how)
    else:
        more = {"normalize": "token"} if weighting == "dft" else {"cu_seqlens": documents(problem)}
        result = balanced_linear_cross_entropy(*problem.inputs, scheme=weighting, **more, **how)
    return result if isinstance(result, Tensor) else result[0]


def _eager(hidden: Tensor, weight: Tensor, target: Tensor, how: str) -> Tensor:
    logits = functional.linear(hidden, weight)
    return functional.cross_entropy(logits.float(), target, reduction=how)


@peer("eager", KEPT, priority=2)
def eager(problem: Problem, weighting: str) -> Tensor:
    """The loss from all logits at once."""
    return _eager(*problem.inputs, reduction(weighting))


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_eager)


@peer("compiled eager", KEPT, compiles=True, priority=4)
def compiled(problem: Problem, weighting: str) -> Tensor:
    """The eager loss, compiled; its weighting is not compiled."""
    return _compiled()(*problem.inputs, reduction(weighting))


_CHUNKS = {
    f"{rows} rows": {"chunking_method": None, "batch_chunk_size": rows} for rows in (256, 512, 1024)
}


@peer("torch chunked", KEPT, AGAIN, options={"auto": {}, **_CHUNKS}, priority=2)
def torch_chunked(problem: Problem, weighting: str, **options: Any) -> Tensor:
    """PyTorch's own chunked loss (torch 2.13)."""
    chosen = torch.nn.LinearCrossEntropyOptions(**options)
    how = {"reduction": reduction(weighting), "options": chosen}
    return functional.linear_cross_entropy(*problem.inputs, **how)


@peer(
    "cut-cross-entropy",
    KEPT,
    installed="cut-cross-entropy: cut_cross_entropy",
    compiles=True,
    priority=2,
)
def cut_cross_entropy(problem: Problem, weighting: str) -> Tensor:
    """Apple's loss; without a GPU its implementation for torch.compile."""
    from cut_cross_entropy import linear_cross_entropy

    implementation = "cce" if problem.hidden.is_cuda else "torch_compile"
    how = {"impl": implementation, "reduction": reduction(weighting)}
    return linear_cross_entropy(*problem.inputs, **how)


@peer("liger chunked", AGAIN, installed="liger-kernel: liger_kernel.chunked_loss.fused_linear_ppo")
def liger_chunked(problem: Problem, weighting: str) -> Tensor:
    """Liger's log-probabilities in chunks of the vocabulary, in plain torch."""
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    inputs = problem.hidden[None], problem.weight, problem.target[None]
    return -LigerFusedLinearPPOBase.chunk_forward(*inputs)[0]


@peer(
    "liger scaled",
    AGAIN_EACH,
    installed="liger-kernel: liger_kernel.ops.fused_linear_scaled_cross_entropy",
)
def liger_scaled(problem: Problem, weighting: str) -> Tensor:
    """Liger's scaled cross-entropy: its kernels on Hopper, elsewhere verl's formulas in torch."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    return LigerFusedLinearScaledCrossEntropyFunction.apply(*problem.inputs)


@peer(
    "liger fused", KEPT, AGAIN, "liger-kernel: liger_kernel.transformers", gpu_only=True, priority=2
)
def liger_fused(problem: Problem, weighting: str) -> Tensor:
    """Liger's fused linear cross-entropy, which has an option for DFT."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    how = {"use_token_scaling": True} if weighting == "dft" else {}
    reduced = "none" if weighting == "bft" else "mean"
    fused = LigerFusedLinearCrossEntropyLoss(reduction=reduced, **how)
    return fused(problem.weight, problem.hidden, problem.target)


@peer("trl", AGAIN, installed="trl: trl.kernels.chunked_logprob")
def trl_chunked(problem: Problem, weighting: str) -> Tensor:
    """TRL's log-probabilities in chunks, as its SFTTrainer calls them, without statistics."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    return -ChunkedLogProbFunction.apply(
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


@peer("verl", AGAIN_EACH, installed="verl: verl.utils.experimental.torch_functional")
def verl_chunked(problem: Problem, weighting: str) -> Tensor:
    """The fused linear layer of verl for PPO: log-probabilities in chunks of 512 tokens."""
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    return -FusedLinearForPPO()(*problem.inputs)[0]


@peer(
    "quack",
    KEPT,
    installed="quack-kernels: quack.linear_cross_entropy",
    weightings=("plain",),
    gpu_only=True,
    priority=4,  # takes long to tune itself
)
def quack(problem: Problem, weighting: str) -> Tensor:
    """QuACK's chunked linear cross-entropy, which chooses its pipeline itself."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(*problem.inputs)
