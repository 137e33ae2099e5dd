"""Token and sequence weights, each token's coefficient, and the loss, in four launches."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bft_kernels.backends.common.weighted import WeightingInputs, balanced_loss_by, weigh_by
from bft_kernels.backends.cuda.native import _cuda, out, ptr, stream
from bft_kernels.weighting import DELTA


def _run(given: WeightingInputs) -> dict[str, Tensor]:
    """See :class:`WeightingInputs`."""
    made = given.vectors(_cuda.WEIGHT_TILE)
    addresses: dict[str, Any] = {f"{name}_ptr": out(vector) for name, vector in made.items()}
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
        num_items_ptr=ptr(num_items),
        stream=stream(),
        **given.flags._asdict(),
        **addresses,
    )
    return made


balanced_loss = partial(balanced_loss_by, _run)
weigh = partial(weigh_by, _run)
