"""Token and sequence weights, what multiplies each token's loss, and the loss, in four launches."""

from __future__ import annotations

import torch
from torch import Tensor

from bft_kernels.backends.cuda import native
from bft_kernels.backends.cuda.native import launch
from bft_kernels.results import BalancedLoss
from bft_kernels.settings import LOCAL_SCHEMES, Settings
from bft_kernels.weighting import DELTA, Weights


def _run(
    loss: Tensor,
    labelled: Tensor,
    cu_seqlens: Tensor,
    num_items: Tensor | None,
    settings: Settings,
    normalize: str | None,  # None: coefficients are the weights
) -> BalancedLoss:
    """See :func:`bft_kernels.weighting.balanced_loss`; the loss is not added up: ``[tiles]``."""
    count, sequences, device = loss.numel(), cu_seqlens.numel() - 1, loss.device
    tiles = -(-count // native.kernels().WEIGHT_TILE)

    def room(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    results = {
        "coefficient": room(count),
        "token_weight": room(count),
        "window_confidence": room(count),
        "sequence_weight": room(sequences),
        "sequence_confidence": room(sequences),
    }
    sums = room(tiles)
    scheme = str(settings.scheme)
    launch(
        "balanced_weights",
        {
            "loss": loss.contiguous(),
            "labelled": labelled.contiguous(),
            "cu_seqlens": cu_seqlens.to(torch.int64).contiguous(),
            "num_items": None if num_items is None else num_items.to(torch.float32),
        },
        {
            "before": room(count + 1, torch.int32),
            "sequence": room(count, torch.int32),
            "values": room(count),
            "lowest": room(count),
            "ended": room(tiles, torch.int32),
            "sums": sums,
            **results,
        },
        N=count,
        S=sequences,
        window=settings.window,
        floor=DELTA,
        gamma=settings.gamma,
        full_windows=scheme.startswith("bft-v1"),
        geometric=scheme == "bft-v1-code",
        confidence=scheme in ("dft", "bft-v1", "bft-v1-code"),
        ratio=scheme == "bft",
        flat=settings.scheme in LOCAL_SCHEMES,
        by_sequence=normalize == "sequence",
        counts=normalize is not None and num_items is None,
    )
    return BalancedLoss(loss=sums, **results)


def balanced_loss(
    loss: Tensor,  # [N] float32, 0 where ignored
    labelled: Tensor,  # [N] bool
    cu_seqlens: Tensor,  # [S + 1] over the N positions
    num_items: Tensor | None,  # []
    settings: Settings,
) -> BalancedLoss:
    """See :func:`bft_kernels.weighting.balanced_loss`, in float32."""
    made = _run(loss, labelled, cu_seqlens, num_items, settings, settings.normalize)
    return made._replace(loss=made.loss.sum())


def weigh(nll: Tensor, labelled: Tensor | None, cu_seqlens: Tensor, settings: Settings) -> Weights:
    """See :func:`bft_kernels.weighting.balance`, in float32."""
    labelled = torch.ones_like(nll, dtype=torch.bool) if labelled is None else labelled
    made = _run(nll, labelled, cu_seqlens, None, settings, None)
    return Weights(*made[1:])
