"""``nn.Module`` twins of the public functions: settings when made, tensors when called."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bft_kernels.functional import (
    balanced_linear_cross_entropy,
    linear_cross_entropy,
)
from bft_kernels.settings import SchemeFunction, Settings, check_scheme_call, check_settings
from bft_kernels.token_stats import BalancedTokenStats


class _Loss(torch.nn.Module):
    _function: Callable[..., Any]

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        known = _options(type(self)._function)
        for name in settings:
            if name not in known:
                raise TypeError(f"{name}: unexpected setting, expected one of {', '.join(known)}")
        check_settings(Settings(**settings))
        self.settings = settings

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


def _options(function: Callable[..., Any]) -> list[str]:
    """The settings that a function takes."""
    return [name for name in inspect.signature(function).parameters if hasattr(Settings, name)]


class LinearCrossEntropyLoss(_Loss):
    """:func:`bft_kernels.linear_cross_entropy` as a module.

    Args:
        ignore_index, reduction, label_smoothing, z_loss: as in the function.
        options: the function's other keywords that are fields of
            :class:`bft_kernels.settings.Settings`.

    Raises:
        TypeError, ValueError: an option is unknown or out of its domain; the message names it.
    """

    _function = staticmethod(linear_cross_entropy)

    def __init__(
        self,
        *,
        ignore_index: int = Settings.ignore_index,
        reduction: str = Settings.reduction,
        label_smoothing: float = Settings.label_smoothing,
        z_loss: float = Settings.z_loss,
        **options: Any,
    ) -> None:
        super().__init__(
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            **options,
        )

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        *,
        bias: Tensor | None = None,
        adapter: tuple[Tensor, Tensor] | None = None,
        cu_seqlens: Tensor | None = None,
        num_items: int | float | Tensor | None = None,
        token_weight: Tensor | None = None,
        class_weight: Tensor | None = None,
        seed: int | Tensor | None = None,
    ) -> Tensor | tuple[Any, ...]:
        """Calls the function: ``hidden [..., D]``, ``weight [V, D]``, ``target [...]``.

        Returns:
            What the function returns.

        Raises:
            TypeError, ValueError, RuntimeError: as the function does.
        """
        return linear_cross_entropy(
            hidden,
            weight,
            target,
            bias=bias,
            adapter=adapter,
            cu_seqlens=cu_seqlens,
            num_items=num_items,
            token_weight=token_weight,
            class_weight=class_weight,
            seed=seed,
            **self.settings,
        )


class BalancedLinearCrossEntropyLoss(_Loss):
    """:func:`bft_kernels.balanced_linear_cross_entropy` as a module.

    Args:
        ignore_index, scheme, window, gamma, normalize: as in the function.
        options: the function's other keywords that are fields of
            :class:`bft_kernels.settings.Settings`.

    Raises:
        TypeError, ValueError: an option is unknown or out of its domain; the message names it.
    """

    _function = staticmethod(balanced_linear_cross_entropy)

    def __init__(
        self,
        *,
        ignore_index: int = Settings.ignore_index,
        scheme: str | SchemeFunction = Settings.scheme,
        window: int = Settings.window,
        gamma: float = Settings.gamma,
        normalize: str = Settings.normalize,
        **options: Any,
    ) -> None:
        super().__init__(
            ignore_index=ignore_index,
            scheme=scheme,
            window=window,
            gamma=gamma,
            normalize=normalize,
            **options,
        )
        if not isinstance(scheme, str):
            check_scheme_call(scheme)

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        *,
        bias: Tensor | None = None,
        adapter: tuple[Tensor, Tensor] | None = None,
        cu_seqlens: Tensor | None = None,
        num_items: int | float | Tensor | None = None,
        token_weight: Tensor | None = None,
        seed: int | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, BalancedTokenStats]:
        """Calls the function: ``hidden [..., D]``, ``weight [V, D]``, ``target [...]``.

        Returns:
            What the function returns.

        Raises:
            TypeError, ValueError, RuntimeError: as the function does.
        """
        return balanced_linear_cross_entropy(
            hidden,
            weight,
            target,
            bias=bias,
            adapter=adapter,
            cu_seqlens=cu_seqlens,
            num_items=num_items,
            token_weight=token_weight,
            seed=seed,
            **self.settings,
        )
