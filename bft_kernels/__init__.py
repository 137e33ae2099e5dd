"""Fused linear cross-entropy with per-token confidence, and Balanced Fine-Tuning's loss."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bft_kernels.functional import (
        balanced_linear_cross_entropy,
        linear_cross_entropy,
        linear_nll,
    )
    from bft_kernels.installation import info
    from bft_kernels.modules import BalancedLinearCrossEntropyLoss, LinearCrossEntropyLoss
    from bft_kernels.precompile import warm_up
    from bft_kernels.token_stats import BalancedTokenStats, TokenStats
    from bft_kernels.weighting import TokenWeights, token_weights
    from bft_kernels.workspace import empty_cache

__version__ = "0.1.0"  # the only place: setuptools reads it from here
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


def __getattr__(name: str) -> Any:
    """Imports torch and the kernels when a public name is asked for, not for a command's help."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for home in ("functional", "modules", "weighting", "installation", "precompile", "workspace"):
        module = importlib.import_module(f"bft_kernels.{home}")
        if name in vars(module):
            globals()[name] = vars(module)[name]
            break
    return globals()[name]


def __dir__() -> list[str]:
    return [*globals(), *__all__]
