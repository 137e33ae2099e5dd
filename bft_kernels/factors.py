"""Constant factors of token losses: the weights of tokens and of classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bft_kernels import ops
from bft_kernels.checks import FLOAT_DTYPES, check_finite, check_tensor
from bft_kernels.problem import Problem, check_derivatives
from bft_kernels.results import Forward
from bft_kernels.weighting import weighted_losses


def token_factor(token_weight: Tensor, problem: Problem, shape: torch.Size) -> Tensor:
    """The weight of each token ``[N]``, a constant; 0 where ignored. Raises as a constant does."""
    _check_constant("token_weight", token_weight, shape, problem)
    factor, labelled = token_weight, problem.labelled
    if problem.settings.shift:  # a weight belongs to its label
        factor = torch.nn.functional.pad(token_weight[..., 1:], (0, 1))
    if problem.settings.check and not torch.compiler.is_compiling():
        check_finite("token_weight", factor.reshape(-1, 1), rows=labelled)
    return torch.where(labelled, factor.reshape(-1), 0).to(problem.acc_dtype)


def class_weights(class_weight: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """The class weights ``[V]``, and those of the labels ``[N]``: constants; 0 where ignored.

    Raises as a constant does.
    """
    vocabulary, settings = problem.weight.shape[0], problem.settings
    _check_constant("class_weight", class_weight, (vocabulary,), problem)
    if settings.check and not torch.compiler.is_compiling():
        check_finite("class_weight", class_weight)
    # A target out of range is the op's to report.
    own = class_weight[problem.target.clamp(0, vocabulary - 1)]
    acc = problem.acc_dtype
    return class_weight.to(acc), torch.where(problem.labelled, own, 0).to(acc)


def or_one(of_label: Tensor) -> Tensor:
    """The sum of the labels' class weights, or 1 if it is 0."""
    total = of_label.sum()
    return total.masked_fill(total == 0, 1)


def with_class_weights(
    problem: Problem,
    w: Tensor,  # [V], class weights
    of_label: Tensor,  # [N], those of the labels
) -> tuple[Forward, Tensor]:
    """A forward, and token losses ``[N]`` with class weights that are no multiple of ``nll``.

    ``sum_v w_v z_v`` without a softcap is ``(h . W^T w + b . w) / temperature``.
    """
    settings = problem.settings
    plain = replace(settings, label_smoothing=0.0, z_loss=0.0, differentiable=("lse",))
    plainly = replace(problem, settings=plain)
    result = ops.linear_nll(plainly)
    losses = (1 - settings.label_smoothing) * weighted_losses(result.loss, of_label)
    if settings.label_smoothing:
        if settings.softcap is None:
            smooth = w.sum() * result.lse - _weighted_logits(problem, w)
        else:
            smooth = ops.spread_loss(plainly, w, result.lse)
        losses = losses + settings.label_smoothing / w.numel() * smooth
    return result, losses + settings.z_loss * result.lse.square()


def _weighted_logits(problem: Problem, w: Tensor) -> Tensor:
    """``sum_v w_v z_v`` of each token, ``[N]``, without a softcap."""
    hidden = problem.hidden.masked_fill(~problem.labelled[:, None], 0)  # it may hold NaN there
    matrices = [problem.weight] if problem.adapter is None else [problem.weight, problem.adapter]
    hidden, *matrices = [x.to(problem.operand).to(problem.acc_dtype) for x in (hidden, *matrices)]
    # No products: settings of the process and autocast could make them narrow.
    rows = torch.cat([(matrix * w[:, None]).sum(0) for matrix in matrices])
    logits = (hidden * rows).sum(1)
    if problem.bias is not None:
        logits = logits + (problem.bias.to(problem.acc_dtype) * w).sum()
    return logits / problem.settings.temperature


def _check_constant(name: str, value: Tensor, shape: Sequence[int], problem: Problem) -> None:
    """Checks a tensor of factors.

    Raises:
        TypeError: it is not a tensor of floats.
        ValueError: it has another shape or device, or requires a gradient.
        RuntimeError: it has a tangent.
    """
    check_tensor(name, value, shape, FLOAT_DTYPES, problem.hidden.device)
    if value.requires_grad:
        raise ValueError(
            f"{name}: got a tensor that requires a gradient, expected a constant: detach it, "
            "or use reduction='none' and multiply"
        )
    check_derivatives(**{name: value})
