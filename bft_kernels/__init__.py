"""Fused linear cross-entropy with per-token confidence, and Balanced Fine-Tuning's loss."""

__version__ = "0.1.0"  # the only place: setuptools reads it from here

from bft_kernels.functional import (
    balanced_linear_cross_entropy,
    linear_cross_entropy,
    linear_nll,
)
from bft_kernels.info import info
from bft_kernels.modules import BalancedLinearCrossEntropyLoss, LinearCrossEntropyLoss
from bft_kernels.token_stats import BalancedTokenStats, TokenStats
from bft_kernels.warm_up import warm_up
from bft_kernels.weighting import TokenWeights, token_weights
from bft_kernels.workspace import empty_cache

__all__ = [
    "BalancedLinearCrossEntropyLoss",
    "BalancedTokenStats",
    "LinearCrossEntropyLoss",
    "TokenStats",
    "TokenWeights",
    "balanced_linear_cross_entropy",
    "empty_cache",
    "info",
    "linear_cross_entropy",
    "linear_nll",
    "token_weights",
    "warm_up",
]
