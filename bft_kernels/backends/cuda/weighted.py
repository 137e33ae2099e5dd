"""A weighted loss with its gradients for unit upstream gradient: four products, no logits kept."""

from __future__ import annotations

import torch
from torch import Tensor

from bft_kernels.backends.cuda.core import gradient_places, row_results, row_values
from bft_kernels.backends.cuda.forward import run_tiles
from bft_kernels.backends.cuda.inputs import Inputs
from bft_kernels.backends.cuda.recompute import recompute
from bft_kernels.backends.cuda.weights import weigh
from bft_kernels.problem import Problem, storage
from bft_kernels.results import Documents, WeightedLoss
from bft_kernels.weighting import Weights, local_weights, weighted_losses


def weighted_loss(
    problem: Problem,
    token_scale: Tensor,  # [N], what multiplies each token's weight: 1/(T_b B), weights over n, ...
    documents: Documents | None,  # None for weights local to a token
) -> WeightedLoss:
    """The loss and its gradients for unit upstream gradient."""
    inputs, hidden, wanted = Inputs.of(problem), problem.hidden, problem.wanted
    count, _, width = inputs.shape
    results = row_results(inputs)
    run_tiles(inputs, results, 0, count)
    labelled = inputs.rows.labelled
    made = Weights(*[hidden.new_empty(0, dtype=torch.float32) for _ in Weights._fields])
    if documents is None:
        weights = local_weights(results["nll"], labelled, problem.settings.scheme)
    else:
        found = weigh(results["nll"], labelled, documents.cu_seqlens, problem.settings)
        weights, made = found.weight, found if problem.statistics else made
    coefficient = inputs.rows.mask(token_scale.float() * weights)

    kept = storage(hidden.dtype), storage(problem.weight.dtype)
    into = gradient_places(inputs, wanted, *kept)
    if any(wanted):
        recompute(inputs, row_values(results, coefficient), None, into, adds=False)

    def given(gradient: Tensor | None, dtype: torch.dtype, *shape: int) -> Tensor:
        if gradient is None:
            return torch.empty(0, *shape, dtype=dtype, device=hidden.device)
        return gradient.to(dtype)

    return WeightedLoss(
        loss=weighted_losses(results["loss"], coefficient).sum(),
        grad_hidden=given(into.hidden, kept[0], width),
        grad_weight=given(into.weight, kept[1], width),
        grad_bias=given(into.bias, torch.float32),
        nll=results["nll"],
        lse=results["lse"],
        entropy=results["entropy"],
        correct=results["correct"],
        token_weight=made.token_weight,
        window_confidence=made.window_confidence,
        sequence_weight=made.sequence_weight,
        sequence_confidence=made.sequence_confidence,
    )
