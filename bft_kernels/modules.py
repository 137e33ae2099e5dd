"""``nn.Module`` twins of the public functions: settings at construction, tensors at the call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bft_kernels.checks import check_settings
from bft_kernels.functional import (
    balanced_linear_cross_entropy,
    linear_cross_entropy,
)
from bft_kernels.token_stats import BalancedTokenStats, TokenStats
from bft_kernels.weighting import SchemeFunction


class _Loss(torch.nn.Module):
    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        check_settings(settings)
        self.settings = settings

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


class LinearCrossEntropyLoss(_Loss):
    """:func:`bft_kernels.linear_cross_entropy` as a module.

    Args:
        ignore_index, reduction, label_smoothing, z_loss: as in the function.
        options: ``softcap, temperature, gradient, eps, backend, max_buffer_bytes, check,
            return_stats, hidden_variance`` of the function.
    """

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(
            {
                "ignore_index": ignore_index,
                "reduction": reduction,
                "label_smoothing": label_smoothing,
                "z_loss": z_loss,
                **_known(options),
            }
        )

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        *,
        bias: Tensor | None = None,
        token_weight: Tensor | None = None,
        seed: int | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, TokenStats]:
        """``hidden [..., D]``, ``weight [V, D]``, ``target [...]``; see the function."""
        return linear_cross_entropy(
            hidden,
            weight,
            target,
            bias=bias,
            token_weight=token_weight,
            seed=seed,
            **self.settings,
        )


class BalancedLinearCrossEntropyLoss(_Loss):
    """:func:`bft_kernels.balanced_linear_cross_entropy` as a module.

    Args:
        ignore_index, scheme, window, gamma, normalize: as in the function.
        options: ``softcap, temperature, gradient, eps, backend, max_buffer_bytes, check,
            return_stats, hidden_variance`` of the function.
    """

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        scheme: str | SchemeFunction = "bft",
        window: int = 256,
        gamma: float = 1.0,
        normalize: str = "sequence",
        **options: Any,
    ) -> None:
        super().__init__(
            {
                "ignore_index": ignore_index,
                "scheme": scheme,
                "window": window,
                "gamma": gamma,
                "normalize": normalize,
                **_known(options),
            }
        )

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        *,
        bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        num_items: int | float | Tensor | None = None,
        seed: int | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, BalancedTokenStats]:
        """``hidden [..., D]``, ``weight [V, D]``, ``target [...]``; see the function."""
        return balanced_linear_cross_entropy(
            hidden,
            weight,
            target,
            bias=bias,
            cu_seqlens=cu_seqlens,
            num_items=num_items,
            seed=seed,
            **self.settings,
        )


_OPTIONS = (
    "softcap",
    "temperature",
    "gradient",
    "eps",
    "backend",
    "max_buffer_bytes",
    "check",
    "return_stats",
    "hidden_variance",
)


def _known(options: dict[str, Any]) -> dict[str, Any]:
    unknown = [name for name in options if name not in _OPTIONS]
    if unknown:
        raise TypeError(f"{unknown[0]}: unexpected setting, expected one of {', '.join(_OPTIONS)}")
    return options
