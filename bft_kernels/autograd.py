"""The one autograd path: how the custom ops' gradients are put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bft_kernels import ops
from bft_kernels.dispatch import offered
from bft_kernels.problem import WANTED, Problem, traits_of
from bft_kernels.results import BalancedLoss, Forward, Saved, Wanted, WeightedLoss
from bft_kernels.settings import TAKEN, WEIGHTED

# Where a problem's arguments begin in each op's, and how many of them are tensors.
_OF_NLL, _OF_SPREAD, _OF_WEIGHTED, _TENSORS = 0, 2, 3, ops.TENSORS
# Elements scaled at a time: a gradient of a narrow type is scaled in float32, block by block.
_SCALE_BLOCK = 2**22


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph: got True, expected False: the fused loss has no second derivative. "
            "Use torch.nn.functional.cross_entropy where one is needed"
        )


def _needed(ctx: Any, first: int) -> Wanted:
    """Which gradients this backward needs; the problem's tensors begin at argument ``first``."""
    needs = ctx.needs_input_grad
    return Wanted(needs[first], needs[first + 1], needs[first + 3], needs[first + 5])


def _gradients(
    ctx: Any,
    first: int,
    hidden: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    adapter: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """A gradient, or ``None``, for each argument of the op."""
    rest = len(ctx.needs_input_grad) - first - _TENSORS
    return (*[None] * first, hidden, weight, None, bias, None, adapter, *[None] * rest)


def _of_op(
    ctx: Any, first: int, made: Sequence[Tensor | None], wanted: Wanted, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    """What a backward returns, from the gradients that a backward op made, wanted or not."""
    dh, dw, db, da = [x if want else None for x, want in zip(made, wanted, strict=True)]
    db = None if db is None or bias is None else db.to(bias.dtype)
    return _gradients(ctx, first, dh, dw, db, da)


def _setup_linear_nll(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, rest = inputs[:_TENSORS], inputs[_TENSORS:]
    result, problem = Forward(*output), ops.as_problem(tensors, rest)
    ctx.set_materialize_grads(False)
    attached = ("loss", *problem.settings.differentiable)
    ctx.mark_non_differentiable(
        *[x for name, x in zip(Forward._fields, output, strict=False) if name not in attached]
    )
    ctx.rest, ctx.saved, ctx.attached = rest, problem.saved, len(attached) > 1
    if ctx.saved == "unit":
        ctx.save_for_backward(problem.target, result.unit)
    else:
        saved = [getattr(result, name) for name in Saved._fields]
        ctx.save_for_backward(*tensors, *saved, *([result.entropy] if ctx.attached else []))
    ctx.hidden_dtype = problem.hidden.dtype
    ctx.ignore_index = problem.settings.ignore_index


def _linear_nll_backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    _refuse_double_backward()
    wanted = _needed(ctx, _OF_NLL)
    given: Any = Forward(*grads)
    grad = given.loss
    if grad is None and given.lse is None and given.entropy is None:
        return _gradients(ctx, _OF_NLL)
    if ctx.saved == "none" or (ctx.saved == "unit" and any(wanted[1:])):
        raise RuntimeError(
            f"wanted: got {wanted} in a backward, expected no more than the forward was told of"
        )
    if ctx.saved == "unit":
        target, unit = ctx.saved_tensors
        upstream = torch.where(target != ctx.ignore_index, grad, 0)
        grad_hidden = (upstream[:, None] * unit).to(ctx.hidden_dtype)
        return _gradients(ctx, _OF_NLL, grad_hidden)
    kept = ctx.saved_tensors  # may be read only once
    tensors, saved = kept[:_TENSORS], Saved(*kept[_TENSORS:][: len(Saved._fields)])
    of_target = given.lse if ctx.saved == "entries" else None  # lse = nll + z_target
    if of_target is not None:
        grad = of_target if grad is None else grad + of_target
    elif ctx.attached and ctx.saved == "recompute":
        grad = _with_statistics((grad, given.lse, given.entropy), kept[-1], saved.lse)
    weight, bias = tensors[1], tensors[3]
    rest = (*ctx.rest[:-WANTED], *wanted)
    into = _gradient_to_add_to(weight) if wanted.weight else None
    made: Sequence[Tensor | None]
    if into is not None:
        problem = ops.as_problem(tensors, rest)
        added = ops.linear_nll_backward(problem, grad, saved, into)
        made = added._replace(weight=None)
    else:
        made = ops.linear_nll_backward_op(grad, *saved, *tensors, *rest)
    if of_target is not None:
        targets = _targets_listed(saved, ops.as_problem(tensors, rest))
        more = ops.linear_nll_backward_op(of_target, *targets, *tensors, *rest)
        made = [b if a is None else a + b for a, b in zip(made, more, strict=True)]
    return _of_op(ctx, _OF_NLL, made, wanted, bias)


def _with_statistics(
    grads: tuple[Tensor | None, ...],  # upstream of the loss, of lse and of the entropy
    entropy: Tensor,  # [N], or [0] if it has no gradient
    lse: Tensor,  # [N]
) -> Tensor:  # [3, N]
    """What :func:`bft_kernels.ops.linear_nll_backward` takes where statistics have a gradient.

    ``d lse / dz_v = p_v``, and ``dH / dz_v = -p_v (z_v - lse + H)`` for the entropy ``H``.
    """
    of_loss, of_p, of_entropy = [torch.zeros_like(lse) if x is None else x for x in grads]
    if entropy.numel():
        of_p = of_p - of_entropy * entropy
    return torch.stack([of_loss, of_p, -of_entropy])


def _targets_listed(saved: Saved, problem: Problem) -> Saved:
    """The lists of a sample that is the gradient of each token's ``z_target``: one entry a row."""
    (count, vocabulary, _), settings = problem.shape, problem.settings
    slope = torch.full_like(saved.lse, 1 / settings.temperature)
    if settings.softcap is not None:
        tanh = (saved.lse - saved.nll) * (settings.temperature / settings.softcap)
        slope = (1 - tanh.square()) / settings.temperature
    return saved._replace(
        csr_offsets=torch.arange(count + 1, dtype=torch.int64, device=slope.device),
        csr_columns=problem.target.clamp(0, vocabulary - 1).to(torch.int32),
        csr_values=slope,
    )


def _gradient_to_add_to(weight: Tensor) -> Tensor | None:
    """``weight.grad``, if autograd would add a returned gradient to it; otherwise ``None``.

    Adding to it here saves the second ``[V, D]`` tensor of gradient accumulation. That would be
    wrong for a non-leaf, under ``torch.autograd.grad`` (which must leave ``.grad`` alone), with
    hooks that must see the gradient, and while tracing.
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


def _setup_spread_loss(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    class_weight, _, *tensors = inputs[: _OF_SPREAD + _TENSORS]
    ctx.save_for_backward(class_weight, *tensors)
    ctx.rest = inputs[_OF_SPREAD + _TENSORS :]


def _spread_loss_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    _refuse_double_backward()
    class_weight, *tensors = ctx.saved_tensors
    wanted = _needed(ctx, _OF_SPREAD)
    made: Sequence[Tensor | None] = (None,) * WANTED
    if any(wanted):
        rest = (*ctx.rest[:-WANTED], *wanted)
        made = ops.spread_loss_backward_op(grad, class_weight, *tensors, *rest)
    _, _, *of_tensors = _of_op(ctx, _OF_SPREAD, made, wanted, tensors[3])
    return None, grad * class_weight.sum(), *of_tensors


def _setup_weighted_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, rest = inputs[_OF_WEIGHTED:][:_TENSORS], inputs[_OF_WEIGHTED + _TENSORS :]
    result = WeightedLoss(*output)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*result[1:])
    ctx.save_for_backward(
        result.grad_hidden, result.grad_weight, result.grad_bias, result.grad_adapter
    )
    hidden, weight, _, bias, _, adapter = tensors
    ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias, adapter)]
    ctx.made, ctx.backend = rest[-WANTED:], rest[TAKEN[WEIGHTED].index("backend")]


def _weighted_loss_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    _refuse_double_backward()
    if grad is None:
        return _gradients(ctx, _OF_WEIGHTED)
    scaled = [
        _scale(gradient, grad, dtype, ctx.backend) if made and needed else None
        for gradient, dtype, made, needed in zip(
            ctx.saved_tensors, ctx.dtypes, ctx.made, _needed(ctx, _OF_WEIGHTED), strict=True
        )
    ]
    return _gradients(ctx, _OF_WEIGHTED, *scaled)


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


def _scale(gradient: Tensor, factor: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """``gradient * factor`` in ``dtype``.

    It works in place, unless the graph is kept or traced, ``gradient`` is a subclass of Tensor, or
    ``factor`` is a batch of factors (``is_grads_batched``).
    """
    functorch = torch._C._functorch
    batched = functorch.is_batchedtensor(factor) or functorch.is_legacy_batchedtensor(factor)
    if torch.compiler.is_compiling() or type(gradient) is not Tensor or batched or _keeps_graph():
        return (gradient.to(factor.dtype) * factor).to(dtype)
    if gradient.device.type == "cpu":
        _scale_on_host(gradient, factor)
    elif scale_ := offered("scale_", backend, traits_of(gradient)):
        scale_(gradient, factor)
    else:  # one kernel: with a vector of one element the product is float32 and is rounded once
        torch.mul(gradient, factor.view(1), out=gradient)
    return gradient.to(dtype)


def _scale_on_host(gradient: Tensor, factor: Tensor) -> None:
    if factor.item() == 1:  # as in loss.backward()
        return
    for block in gradient.flatten().split(_SCALE_BLOCK):
        if block.dtype == factor.dtype:
            block.mul_(factor)
        else:
            block.copy_(block.to(factor.dtype) * factor)


def _keeps_graph() -> bool:
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


for _op in ("linear_nll", "linear_nll_top_k"):
    torch.library.register_autograd(
        f"bft_kernels::{_op}", _linear_nll_backward, setup_context=_setup_linear_nll
    )
torch.library.register_autograd(
    "bft_kernels::spread_loss", _spread_loss_backward, setup_context=_setup_spread_loss
)
torch.library.register_autograd(
    "bft_kernels::weighted_loss", _weighted_loss_backward, setup_context=_setup_weighted_loss
)
torch.library.register_autograd(
    "bft_kernels::balanced_loss", _balanced_loss_backward, setup_context=_setup_balanced_loss
)
