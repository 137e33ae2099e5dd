"""Token and sequence weights, each token's coefficient, and the loss, in four launches."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bft_kernels.backends.common.weighted import WeightingInputs, balanced_loss_by, weigh_by
from bft_kernels.backends.cuda.native import _cuda, out, ptr, stream
from bft_kernels.weighting import DELTA


def _run(given: WeightingInputs) -> dict[str, Tensor]:
    """See :class:`WeightingInputs`."""
    made, flags = given.vectors(_cuda.WEIGHT_TILE), given.flags
    cu_seqlens = given.cu_seqlens.to(torch.int64)
    num_items = None if given.num_items is None else given.num_items.to(torch.float32)
    _cuda.balanced_weighting(
        loss_ptr=ptr(given.loss),
        labelled_ptr=ptr(given.labelled),
        cu_seqlens_ptr=ptr(cu_seqlens),
        N=given.loss.numel(),
        S=cu_seqlens.numel() - 1,
        window=given.settings.window,
        delta=DELTA,
        gamma=given.settings.gamma,
        full_windows=flags.full_windows,
        geometric=flags.geometric,
        confidence=flags.confidence,
        ratio=flags.ratio,
        flat=flags.flat,
        by_sequence=flags.by_sequence,
        counts=flags.counts,
        num_items_ptr=ptr(num_items),
        before_ptr=out(made["before"]),
        sequence_ptr=out(made["sequence"]),
        values_ptr=out(made["values"]),
        lowest_ptr=out(made["lowest"]),
        ended_ptr=out(made["ended"]),
        coefficient_ptr=out(made["coefficient"]),
        token_weight_ptr=out(made["token_weight"]),
        window_confidence_ptr=out(made["window_confidence"]),
        sequence_weight_ptr=out(made["sequence_weight"]),
        sequence_confidence_ptr=out(made["sequence_confidence"]),
        sums_ptr=out(made["sums"]),
        stream=stream(),
    )
    return made


balanced_loss = partial(balanced_loss_by, _run)
weigh = partial(weigh_by, _run)
