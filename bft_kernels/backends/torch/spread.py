"""The loss of a label that is spread over the classes: smoothing, class weights and a softcap.

Without the softcap it needs one product of ``hidden`` with a weighted sum of rows of ``weight``.
"""

from dataclasses import replace

import torch
from torch import Tensor

from bft_kernels.backends.common.gemm import transform_logits
from bft_kernels.backends.common.rows import LabelledRows
from bft_kernels.backends.torch.backward import Place, by_columns
from bft_kernels.problem import Problem
from bft_kernels.results import Gradients, Wanted


def spread_loss(
    problem: Problem,
    class_weight: Tensor,  # [V] acc
    lse: Tensor,  # [N] acc
) -> Tensor:  # [N] acc, 0 where ignored
    """``sum_v w_v (lse - z_v)`` of each token."""
    rows = LabelledRows(problem.target, problem.settings.ignore_index)
    total = lse.new_zeros(rows.size)

    def add(y: Tensor, part: list[Tensor], at: Place) -> None:
        transform_logits(y, at.bias, problem.settings, None)
        torch.sub(part[0][:, None], y, out=y)
        of_class = class_weight[at.first_column :][: y.shape[1]]
        total[at.first_row :][: y.shape[0]].addmv_(y, of_class)

    nothing = replace(problem, wanted=Wanted(hidden=False, weight=False, bias=False))
    by_columns(nothing, rows, (lse,), add, scratch=0)
    return rows.spread(total)


def spread_loss_backward(
    problem: Problem,
    grad: Tensor,  # [N] acc
    class_weight: Tensor,  # [V] acc
) -> Gradients:
    """The wanted gradients of ``sum(grad * spread_loss)`` for a constant ``lse``."""
    settings, weight = problem.settings, problem.weight
    rows = LabelledRows(problem.target, settings.ignore_index)

    def write(y: Tensor, part: list[Tensor], at: Place) -> None:
        slope = None if settings.softcap is None else torch.empty_like(y)
        transform_logits(y, at.bias, settings, slope)
        of_class = class_weight[at.first_column :][: y.shape[1]]
        torch.mul(part[0][:, None], of_class, out=y).div_(-settings.temperature)
        if slope is not None:
            y.mul_(slope)

    grad_weight = None
    if problem.wanted.weight:
        grad_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    scratch = 2 * (settings.softcap is not None)
    return by_columns(problem, rows, (grad,), write, grad_weight, scratch=scratch)
