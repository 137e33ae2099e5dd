"""Token and sequence weights, each token's coefficient, and the loss, in four launches."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bft_kernels.backends.common.weighted import balanced_loss_by, weigh_by
from bft_kernels.backends.cuda.native import _cuda, out, ptr, stream
from bft_kernels.results import BalancedLoss
from bft_kernels.settings import LOCAL_SCHEMES, Settings
from bft_kernels.weighting import DELTA


def _run(
    loss: Tensor,
    labelled: Tensor,
    cu_seqlens: Tensor,
    num_items: Tensor | None,
    settings: Settings,
    normalize: str | None,  # None: coefficients are the weights
) -> BalancedLoss:
    """See :func:`bft_kernels.weighting.balanced_loss`; its loss is ``[tiles]`` sums."""
    count, sequences, device = loss.numel(), cu_seqlens.numel() - 1, loss.device
    tiles = -(-count // _cuda.WEIGHT_TILE)

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
    loss, labelled = loss.contiguous(), labelled.contiguous()
    cu_seqlens = cu_seqlens.to(torch.int64).contiguous()
    num_items = None if num_items is None else num_items.to(torch.float32)
    before, sequence = room(count + 1, torch.int32), room(count, torch.int32)
    values, lowest, ended = room(count), room(count), room(tiles, torch.int32)
    _cuda.balanced_weighting(
        loss_ptr=ptr(loss),
        labelled_ptr=ptr(labelled),
        cu_seqlens_ptr=ptr(cu_seqlens),
        N=count,
        S=sequences,
        window=settings.window,
        delta=DELTA,
        gamma=settings.gamma,
        full_windows=scheme.startswith("bft-v1"),
        geometric=scheme == "bft-v1-code",
        confidence=scheme in ("dft", "bft-v1", "bft-v1-code"),
        ratio=scheme == "bft",
        flat=settings.scheme in LOCAL_SCHEMES,
        by_sequence=normalize == "sequence",
        counts=normalize is not None and num_items is None,
        num_items_ptr=ptr(num_items),
        before_ptr=out(before),
        sequence_ptr=out(sequence),
        values_ptr=out(values),
        lowest_ptr=out(lowest),
        ended_ptr=out(ended),
        coefficient_ptr=out(results["coefficient"]),
        token_weight_ptr=out(results["token_weight"]),
        window_confidence_ptr=out(results["window_confidence"]),
        sequence_weight_ptr=out(results["sequence_weight"]),
        sequence_confidence_ptr=out(results["sequence_confidence"]),
        sums_ptr=out(sums),
        stream=stream(),
    )
    return BalancedLoss(loss=sums, **results)


balanced_loss = partial(balanced_loss_by, _run)
weigh = partial(weigh_by, _run)
