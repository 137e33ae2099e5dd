"""The exact weighted loss: losses first, then gradients with the weights that follow from them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bft_kernels.backends.triton.core import linear_nll
from bft_kernels.backends.triton.forward import Inputs
from bft_kernels.backends.triton.recompute import RowValues, add_recomputed
from bft_kernels.config import CoreConfig, Weighting, storage
from bft_kernels.results import Gradients, Wanted, WeightedLoss
from bft_kernels.weighting import balance, labelled_layout


def weighted_loss(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [N]
    share: Tensor,  # [N], what multiplies each token's weight: 1/(T_b B), token weights over n, ...
    cu_seqlens: Tensor | None,  # [S + 1]; None for weights local to a token
    bias: Tensor | None,  # [V]
    config: CoreConfig,
    weighting: Weighting,
    wanted: Wanted,
) -> WeightedLoss:
    """The loss and its gradients for unit upstream gradient."""
    inputs = Inputs.of(hidden, weight, target, bias, config)
    forward = linear_nll(
        hidden, weight, target, bias, None, replace(config, residual="recompute", variance=False)
    )
    if cu_seqlens is None:
        cu_seqlens = torch.arange(2, device=hidden.device) * target.numel()
    layout = labelled_layout(inputs.rows.labelled, cu_seqlens.to(hidden.device))
    settings = (weighting.scheme, weighting.window, weighting.gamma, weighting.floor)
    coefficient = share.float() * balance(forward.nll, layout, *settings).weight
    coefficient = inputs.rows.mask(coefficient)
    # Where a weight is 0 an infinite loss counts nothing.
    losses = torch.where(coefficient != 0, coefficient * forward.loss, 0)
    (count, vocabulary, width), device = inputs.shape, hidden.device

    def zeros(want: bool, rows: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(rows if want else 0, width, dtype=dtype, device=device)

    grad_hidden = zeros(wanted.hidden, count, storage(hidden.dtype))
    grad_weight = zeros(wanted.weight, vocabulary, storage(weight.dtype))
    grad_bias = torch.zeros(vocabulary if wanted.bias else 0, device=device)
    into = Gradients(
        grad_hidden if wanted.hidden else None,
        grad_weight if wanted.weight else None,
        grad_bias if wanted.bias else None,
    )
    known = RowValues(forward.lse, forward.lse_low, forward.nll, coefficient)
    add_recomputed(inputs, known, None, wanted, into)
    return WeightedLoss(
        loss=losses.sum(),
        grad_hidden=grad_hidden,
        grad_weight=grad_weight,
        grad_bias=grad_bias,
        nll=forward.nll,
        lse=forward.lse,
        entropy=forward.entropy,
        correct=forward.correct,
    )
