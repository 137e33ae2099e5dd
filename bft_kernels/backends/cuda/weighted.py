"""A weighted loss with its gradients for unit upstream gradient: four products, no logits kept."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bft_kernels.backends.cuda.core import gradient_places, row_results, row_values
from bft_kernels.backends.cuda.forward import run_tiles
from bft_kernels.backends.cuda.inputs import Inputs
from bft_kernels.backends.cuda.recompute import recompute
from bft_kernels.backends.cuda.weights import joint_weights
from bft_kernels.config import CoreConfig, Weighting, storage
from bft_kernels.results import Documents, Wanted, WeightedLoss
from bft_kernels.weighting import local_weights


def weighted_loss(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [N]
    share: Tensor,  # [N], what multiplies each token's weight: 1/(T_b B), token weights over n, ...
    documents: Documents | None,  # None for weights local to a token
    bias: Tensor | None,  # [V]
    config: CoreConfig,
    weighting: Weighting,
    wanted: Wanted,
) -> WeightedLoss:
    """The loss and its gradients for unit upstream gradient."""
    inputs = Inputs.of(hidden, weight, target, bias, replace(config, residual="recompute"))
    count, _, width = inputs.shape
    results = row_results(inputs)
    run_tiles(inputs, results, 0, count)
    labelled = inputs.rows.labelled
    if documents is None:
        weights = local_weights(results["nll"], labelled, weighting.scheme)
    else:
        weights = joint_weights(results["nll"], labelled, documents.cu_seqlens, weighting)
    coefficient = inputs.rows.mask(share.float() * weights)
    # Where a weight is 0 an infinite loss counts nothing.
    losses = torch.where(coefficient != 0, results["loss"], 0.0)

    kept = storage(hidden.dtype), storage(weight.dtype)
    into = gradient_places(inputs, wanted, *kept)
    if any(wanted):
        recompute(inputs, row_values(results, coefficient), None, into, adds=False)

    def given(gradient: Tensor | None, dtype: torch.dtype, *shape: int) -> Tensor:
        if gradient is None:
            return torch.empty(0, *shape, dtype=dtype, device=hidden.device)
        return gradient.to(dtype)

    return WeightedLoss(
        loss=(coefficient * losses).sum(),
        grad_hidden=given(into.hidden, kept[0], width),
        grad_weight=given(into.weight, kept[1], width),
        grad_bias=given(into.bias, torch.float32),
        nll=results["nll"],
        lse=results["lse"],
        entropy=results["entropy"],
        correct=results["correct"],
    )
