"""The two uses of a backend's weight kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from bft_kernels.config import Weighting
from bft_kernels.results import BalancedLoss


@dataclass(frozen=True)
class WeightFunctions:
    """What a backend offers, from a function that runs its kernels.

    ``run`` takes the arguments of :meth:`balanced_loss` and, before the last, whether to divide by
    this call's own number of items. Its loss is not added up yet: ``[tiles]``.
    """

    run: Callable[[Tensor, Tensor, Tensor, Tensor | None, str, bool, Weighting], BalancedLoss]

    def balanced_loss(
        self,
        loss: Tensor,  # [N] float32, 0 where ignored
        labelled: Tensor,  # [N] bool
        cu_seqlens: Tensor,  # [S + 1] over the N positions
        num_items: Tensor | None,  # []
        normalize: str,
        weighting: Weighting,
    ) -> BalancedLoss:
        """See :func:`bft_kernels.weighting.balanced_loss`, in float32."""
        counts = num_items is None
        found = self.run(loss, labelled, cu_seqlens, num_items, normalize, counts, weighting)
        return found._replace(loss=found.loss.sum())

    def joint_weights(
        self, nll: Tensor, labelled: Tensor, cu_seqlens: Tensor, weighting: Weighting
    ) -> Tensor:
        """Token weight times sequence weight, ``[N]``."""
        return self.run(nll, labelled, cu_seqlens, None, "token", False, weighting).coefficient
