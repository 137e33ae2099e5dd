"""Fused linear cross-entropy with per-token confidence, and Balanced Fine-Tuning's loss."""

import importlib.util
import sys
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
    """Imports torch and what is public when it is first asked for; a command's help needs none."""
    if name in __all__:
        _import_public()
        return globals()[name]
    if name.startswith("_") or importlib.util.find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _import_public() -> None:
    for home in ("functional", "installation", "modules", "precompile", "weighting", "workspace"):
        module = vars(importlib.import_module(f"{__name__}.{home}"))
        globals().update({name: module[name] for name in __all__ if name in module})


if "torch" in sys.modules:  # then it costs little, and saved programs find the custom ops
    _import_public()
