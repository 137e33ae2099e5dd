"""The one autograd path: how the custom ops' gradients are put together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bft_kernels import ops
from bft_kernels.config import CONFIG_SCHEMA, CoreConfig
from bft_kernels.results import BalancedLoss, Forward, Saved, Wanted, WeightedLoss

_CONFIG = CONFIG_SCHEMA.count(",") + 1
# Elements scaled at a time: a gradient of a narrow type is scaled in float32, block by block.
_SCALE_BLOCK = 2**22


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph: got True, expected False: the fused loss has no second derivative. "
            "Use torch.nn.functional.cross_entropy where one is needed"
        )


def _setup_linear_nll(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, target, bias, seed = inputs[: ops.LINEAR_NLL_TENSORS]
    result = Forward(*output)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*result[1:])
    ctx.config = CoreConfig(*inputs[ops.LINEAR_NLL_TENSORS :])
    if ctx.config.residual == "unit":
        ctx.save_for_backward(target, result.unit)
    else:
        saved = Saved(
            result.nll,
            result.lse,
            result.lse_low,
            result.entry_offsets,
            result.entry_columns,
            result.entry_values,
            seed,
        )
        ctx.save_for_backward(hidden, weight, target, bias, *saved)
    ctx.hidden_dtype = hidden.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_nll_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    _refuse_double_backward()
    nothing = (None,) * (ops.LINEAR_NLL_TENSORS - 4 + _CONFIG)
    wanted = Wanted(ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
    config: CoreConfig = ctx.config
    if grad is None:
        return (None, None, None, None, *nothing)
    if config.residual == "none" or (config.residual == "unit" and (wanted.weight or wanted.bias)):
        raise RuntimeError(
            f"residual: got {config.residual!r}, expected one that allows the gradients asked for"
        )
    if config.residual == "unit":
        target, unit = ctx.saved_tensors
        upstream = torch.where(target != config.ignore_index, grad, 0)
        return ((upstream[:, None] * unit).to(ctx.hidden_dtype), None, None, None, *nothing)
    hidden, weight, target, bias, *rest = ctx.saved_tensors
    saved = Saved(*rest)
    into = _gradient_to_add_to(weight) if wanted.weight else None
    dh: Tensor | None
    dw: Tensor | None
    db: Tensor | None
    if into is not None:
        gradients = ops.run_backward(
            grad, hidden, weight, target, bias, saved, config, wanted, into
        )
        dh, dw, db = gradients.hidden, None, gradients.bias
    else:
        dh, dw, db = ops.linear_nll_backward(
            grad, hidden, weight, target, bias, *saved, *config.arguments(), *wanted
        )
    db = None if db is None or not wanted.bias else db.to(ctx.bias_dtype)
    return (dh if wanted.hidden else None, dw if wanted.weight else None, None, db, *nothing)


def _gradient_to_add_to(weight: Tensor) -> Tensor | None:
    """``weight.grad``, where adding to it here is what autograd would do with a returned gradient.

    That saves the second ``[V, D]`` tensor of gradient accumulation. It is not the same for a
    non-leaf, under ``torch.autograd.grad`` (which must leave ``.grad`` alone), with hooks that
    want to see the gradient, or while tracing.
    """
    if torch.compiler.is_compiling() or type(weight) not in (Tensor, torch.nn.Parameter):
        return None
    if not weight.is_leaf or type(weight.grad) is not Tensor or weight.grad.requires_grad:
        return None
    if weight._backward_hooks or weight._post_accumulate_grad_hooks:
        return None
    if weight.grad.dtype != weight.dtype or weight.grad.layout != torch.strided:
        return None
    accumulate = torch.autograd.graph.get_gradient_edge(weight).node
    try:
        executes = torch._C._will_engine_execute_node(accumulate)
    except RuntimeError:  # torch.autograd.grad asks for this very gradient
        return None
    return weight.grad if executes else None


def _setup_weighted_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, *_, bias = inputs[: ops.WEIGHTED_LOSS_TENSORS]
    result = WeightedLoss(*output)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*result[1:])
    ctx.save_for_backward(result.grad_hidden, result.grad_weight, result.grad_bias)
    ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
    ctx.wanted = ops.split_weighted(inputs[ops.WEIGHTED_LOSS_TENSORS :])[2]


def _weighted_loss_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    _refuse_double_backward()
    needs = ctx.needs_input_grad
    nothing = (None,) * (len(needs) - ops.WEIGHTED_LOSS_TENSORS)
    if grad is None:
        return (None,) * len(needs)
    scaled = [
        _scale(gradient, grad, dtype) if want and needed else None
        for gradient, dtype, want, needed in zip(
            ctx.saved_tensors, ctx.dtypes, ctx.wanted, (needs[0], needs[1], needs[6]), strict=True
        )
    ]
    return (scaled[0], scaled[1], None, None, None, None, scaled[2], *nothing)


def _setup_balanced_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    result = BalancedLoss(*output)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*result[1:])
    ctx.save_for_backward(result.coefficient)
    ctx.others = len(inputs) - 1


def _balanced_loss_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    (coefficient,) = ctx.saved_tensors
    own = None if grad is None else grad * coefficient
    return (own, *(None,) * ctx.others)


def _scale(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``gradient * factor`` in ``dtype``; in place unless the graph is kept, or ``factor`` is a
    batch of factors (``is_grads_batched``).
    """
    functorch = torch._C._functorch
    batched = functorch.is_batchedtensor(factor) or functorch.is_legacy_batchedtensor(factor)
    if torch.compiler.is_compiling() or type(gradient) is not Tensor or batched or _keeps_graph():
        return (gradient.to(factor.dtype) * factor).to(dtype)
    if factor.device.type == "cpu" and factor.item() == 1:  # as in loss.backward()
        return gradient.to(dtype)
    for block in gradient.flatten().split(_SCALE_BLOCK):
        if block.dtype == factor.dtype:
            block.mul_(factor)
        else:
            block.copy_(block.to(factor.dtype) * factor)
    return gradient.to(dtype)


def _keeps_graph() -> bool:
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


torch.library.register_autograd(
    "bft_kernels::linear_nll", _linear_nll_backward, setup_context=_setup_linear_nll
)
torch.library.register_autograd(
    "bft_kernels::weighted_loss", _weighted_loss_backward, setup_context=_setup_weighted_loss
)
torch.library.register_autograd(
    "bft_kernels::balanced_loss", _balanced_loss_backward, setup_context=_setup_balanced_loss
)
