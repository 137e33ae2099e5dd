"""The statistics of each token beside its loss, in the shape that the caller gave."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bft_kernels.problem import Problem
from bft_kernels.results import BalancedLoss, Forward, WeightedLoss


class TokenStats(NamedTuple):
    """Statistics in the shape of ``target``; ignored tokens have 0 or False.

    They are detached, except ``lse`` and ``entropy`` where the call's ``differentiable`` has them.

    All but ``correct`` are float32, or float64 for float64 inputs.
    """

    nll: Tensor
    lse: Tensor
    confidence: Tensor  # exp(-nll)
    entropy: Tensor  # nats
    correct: Tensor  # bool; ties go to the lowest index
    # If sampled: the expected squared error of the row of dy, for unit upstream gradient.
    variance: Tensor | None = None
    hidden_variance: Tensor | None = None  # the same for the row of dH, if it is wanted
    # The most probable tokens [..., k] when asked for, the best first; -1 and 0 where ignored.
    top_ids: Tensor | None = None  # int64; ties go to the lowest index
    top_log_probs: Tensor | None = None


class BalancedTokenStats(NamedTuple):
    """:class:`TokenStats` and the weights. A sequence without labels has 0 in its fields.

    All but ``correct`` are float32, or float64 for float64 inputs.
    """

    nll: Tensor
    lse: Tensor
    confidence: Tensor
    entropy: Tensor
    correct: Tensor  # bool
    variance: Tensor | None
    hidden_variance: Tensor | None
    window_confidence: Tensor  # target's shape
    token_weight: Tensor  # target's shape
    sequence_confidence: Tensor  # [S]
    sequence_weight: Tensor  # [S]


def token_stats(problem: Problem, result: Forward | WeightedLoss, shape: torch.Size) -> TokenStats:
    """The statistics from a call's results, in the ``shape`` of its target."""

    def shaped(values: Tensor, name: str = "") -> Tensor:
        attached = name in problem.settings.differentiable
        return (values if attached else values.detach()).view(shape)

    variance = hidden_variance = ids = log_probs = None
    if isinstance(result, Forward):
        variance = shaped(result.variance) if problem.variance else None
        hidden_variance = shaped(result.hidden_variance) if problem.hidden_variance else None
        if result.top_ids is not None and result.top_log_probs is not None:
            best = *shape, problem.settings.top_k
            ids, log_probs = result.top_ids.view(best), result.top_log_probs.view(best)
    return TokenStats(
        nll=shaped(result.nll),
        lse=shaped(result.lse, "lse"),
        confidence=shaped(torch.where(problem.labelled, torch.exp(-result.nll), 0.0)),
        entropy=shaped(result.entropy, "entropy"),
        correct=shaped(result.correct),
        variance=variance,
        hidden_variance=hidden_variance,
        top_ids=ids,
        top_log_probs=log_probs,
    )


def balanced_stats(
    stats: TokenStats, weighting: BalancedLoss | WeightedLoss, shape: torch.Size
) -> BalancedTokenStats:
    """``stats`` together with the weights, those of tokens in ``shape``."""
    return BalancedTokenStats(
        *stats[:-2],  # of the most probable tokens it says nothing
        window_confidence=weighting.window_confidence.view(shape),
        token_weight=weighting.token_weight.view(shape),
        sequence_confidence=weighting.sequence_confidence,
        sequence_weight=weighting.sequence_weight,
    )
