"""What is known of each token beside its loss, in the shape that the caller gave."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bft_kernels.call import Call
from bft_kernels.results import BalancedLoss, Forward, WeightedLoss


class TokenStats(NamedTuple):
    """Detached statistics in the shape of ``target``; 0 or False where ignored."""

    nll: Tensor  # float32
    lse: Tensor  # float32
    confidence: Tensor  # float32, exp(-nll)
    entropy: Tensor  # float32, nats
    correct: Tensor  # bool; ties go to the lowest index
    variance: Tensor | None = (
        None  # sampled: expected squared error of the row of dy, unit upstream
    )
    hidden_variance: Tensor | None = None  # the same for the row of dH, when asked for


class BalancedTokenStats(NamedTuple):
    """:class:`TokenStats` and the weights. Per-sequence fields are 0 for one without labels."""

    nll: Tensor
    lse: Tensor
    confidence: Tensor
    entropy: Tensor
    correct: Tensor
    variance: Tensor | None
    hidden_variance: Tensor | None
    window_confidence: Tensor  # target's shape
    token_weight: Tensor  # target's shape
    sequence_confidence: Tensor  # [S]
    sequence_weight: Tensor  # [S]


def token_stats(call: Call, result: Forward | WeightedLoss) -> TokenStats:
    """Of a call's results."""

    def shaped(values: Tensor) -> Tensor:
        return values.detach().view(call.shape)

    sampled = isinstance(result, Forward) and call.config.variance
    weighted = sampled and call.config.hidden_variance
    assert not sampled or isinstance(result, Forward)
    confidence = torch.where(call.labelled, torch.exp(-result.nll), 0.0)
    return TokenStats(
        nll=shaped(result.nll),
        lse=shaped(result.lse),
        confidence=shaped(confidence),
        entropy=shaped(result.entropy),
        correct=shaped(result.correct),
        variance=shaped(result.variance) if sampled else None,  # type: ignore[union-attr]
        hidden_variance=shaped(result.hidden_variance) if weighted else None,  # type: ignore[union-attr]
    )


def balanced_stats(call: Call, stats: TokenStats, balanced: BalancedLoss) -> BalancedTokenStats:
    """The same with the weights."""
    return BalancedTokenStats(
        *stats,
        window_confidence=balanced.window_confidence.view(call.shape),
        token_weight=balanced.token_weight.view(call.shape),
        sequence_confidence=balanced.sequence_confidence,
        sequence_weight=balanced.sequence_weight,
    )
