"""The public functions: per-token loss, reduced cross-entropy and the balanced loss.

All take ``hidden [..., D]``, ``weight [V, D]`` and ``target [...]``. With ``shift=True`` they shift
the labels for next-token prediction; otherwise the caller has aligned them. Logits exist only in
blocks of ``max_buffer_bytes``. Sums over ``V`` and ``N`` and the gradients of blocks are
accumulated in float32, whatever the inputs (in float64 for float64). Products of float32 are
float32, whatever :func:`torch.set_float32_matmul_precision` and ``fp32_precision`` allow elsewhere.
Autocast makes them narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bft_kernels import autograd as _autograd  # noqa: F401  registers the gradients
from bft_kernels import ops
from bft_kernels.checks import check_boundaries
from bft_kernels.documents import Layout, boundaries_beside, labelled_layout, token_scales
from bft_kernels.factors import class_weights, or_one, token_factor, with_class_weights
from bft_kernels.problem import Problem, make_problem
from bft_kernels.results import BalancedLoss, Forward, WeightedLoss
from bft_kernels.settings import CALLABLE, LOCAL_SCHEMES, SchemeFunction, Settings
from bft_kernels.token_stats import BalancedTokenStats, TokenStats, balanced_stats, token_stats
from bft_kernels.values import check_number
from bft_kernels.weighting import balanced_loss, local_weighting, weighted_losses


def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    ignore_index: int = Settings.ignore_index,
    shift: bool = Settings.shift,
    cu_seqlens: Tensor | None = None,
    softcap: float | None = Settings.softcap,
    temperature: float = Settings.temperature,
    gradient: str = Settings.gradient,
    eps: float = Settings.eps,
    seed: int | Tensor | None = None,
    backend: str = Settings.backend,
    max_buffer_bytes: int | None = Settings.max_buffer_bytes,
    check: bool | None = Settings.check,
    return_stats: bool = Settings.return_stats,
    hidden_variance: bool = Settings.hidden_variance,
    out_dtype: torch.dtype | None = Settings.out_dtype,
    differentiable: Sequence[str] = Settings.differentiable,
    top_k: int = Settings.top_k,
) -> Tensor | tuple[Tensor, TokenStats]:
    """``nll = logsumexp(z) - z[target]`` per token, ``z = softcap(hidden @ weight.T + bias) / T``.

    It is differentiable in ``hidden``, ``weight``, ``bias`` and ``adapter``, for any upstream
    gradient.

    Args:
        hidden: ``[..., D]`` bfloat16, float16, float32 or float64.
        weight: ``[V, D]``, same device. Its dtype may differ, but float64 is not mixed with others.
        target: ``[...]`` int64, int32 or uint8, ``0 <= target < V`` or ``ignore_index``.
        bias: ``[V]``. Entries of ``-inf`` mask columns of the vocabulary.
        adapter: a low-rank adapter of the head, ``(a, b)`` with ``a [..., r]`` and ``b [V, r]``,
            which adds ``a @ b.T`` to the products. For LoRA's ``A [r, D]`` and ``B [V, r]`` it is
            ``(scaling * dropout(hidden) @ A.T, B)``. No ``[V, D]`` is made: each block of logits
            takes two products, and only ``a``, ``b`` and ``hidden`` get gradients if ``weight``
            is frozen. ``a`` is rounded as ``hidden`` is in a product. Plain PyTorch computes such a
            call for the ``cpu`` backend, for ``sampled``, and the exact backward of token losses.
        ignore_index: tokens with this target have loss 0 and get no gradient.
        shift: ``target [..., T]`` holds the labels as the model reads them: position ``t`` predicts
            ``target[..., t + 1]``, and the last position of each row predicts nothing.
        cu_seqlens: ``[S + 1]`` int32 or int64 over all flattened positions, for ``shift`` only: the
            first token of each document is not predicted from the document before it.
        softcap: ``y -> softcap * tanh(y / softcap)`` before the temperature.
        temperature: divides the logits.
        gradient: ``"exact"``, or ``"sampled"``: an unbiased sparse estimate made in the forward
            pass (see :func:`bft_kernels.reference.sampled_gradient`).
        eps: ``sampled`` always keeps entries with ``p >= eps``, and others with probability
            ``p / eps``. At most ``1 / eps`` entries a token are expected.
        seed: the seed of the sample: an int64, or an int64 tensor ``[]`` on the device. ``None``
            draws one from torch's generator of that device.
        backend: ``"auto"`` or a backend's name, see :func:`bft_kernels.info`.
        max_buffer_bytes: bytes of the blocks of logits. By default 64 MiB on a CPU and 528 MiB on a
            GPU, or 2 GiB on a GPU with more than 40 GiB.
        check: ``True`` checks all values: targets, boundaries, and that labelled rows of
            ``hidden``, ``weight`` and ``bias`` are finite (it waits for a GPU). ``False`` checks
            none. ``None`` checks those targets and boundaries that lie on the CPU. ``num_items`` is
            checked wherever that takes no waiting.
        return_stats: also return :class:`TokenStats`.
        hidden_variance: with ``sampled``, also fill the statistic of that name.
        out_dtype: a float type for the loss, such as that of ``hidden``. It is rounded at the end;
            statistics and gradients are those of the unrounded loss.
        differentiable: ``"lse"``, ``"entropy"`` or both: these statistics are returned (it implies
            ``return_stats``) and have gradients. With ``exact``, plain PyTorch computes the
            backward of such a call in blocks, whatever the backend: 4G with a trained head, 3G with
            a frozen one, and nothing of ``[N, V]``. With ``sampled`` lse has the gradient of the
            sampled ``nll`` plus that of ``z_target``, so it is unbiased; the entropy is refused.
        top_k: also return ids and log-probabilities of that many most probable tokens (it implies
            ``return_stats``), from the same pass over chunks of whole rows. The ``cpu`` backend,
            whose blocks hold no whole rows, leaves the forward of such a call to plain PyTorch.

    Returns:
        ``[...]`` float32 (float64 for float64 inputs) or ``out_dtype``, or ``(nll, stats)``.

    Raises:
        TypeError, ValueError: an argument is out of its domain; the message names it.
        RuntimeError: the forced backend cannot run this; the backward has ``create_graph=True``;
            the call is inside a transform of ``torch.func``; or an argument has a forward-mode
            tangent.
    """
    settings = Settings(
        ignore_index=ignore_index,
        shift=shift,
        softcap=softcap,
        temperature=temperature,
        gradient=gradient,
        eps=eps,
        backend=backend,
        max_buffer_bytes=max_buffer_bytes,
        check=check,
        return_stats=return_stats or bool(differentiable) or top_k != 0,
        hidden_variance=hidden_variance,
        out_dtype=out_dtype,
        differentiable=differentiable,
        top_k=top_k,
    )
    _check_shift(shift, cu_seqlens)
    problem = make_problem(hidden, weight, target, bias, seed, settings, cu_seqlens, adapter)
    if top_k > weight.shape[0]:
        raise ValueError(f"top_k: got {top_k}, expected at most V = {weight.shape[0]}")
    result = ops.linear_nll(problem)
    loss = _rounded(result.loss.view(target.shape), settings)
    return (loss, token_stats(problem, result, target.shape)) if settings.return_stats else loss


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    ignore_index: int = Settings.ignore_index,
    shift: bool = Settings.shift,
    cu_seqlens: Tensor | None = None,
    reduction: str = Settings.reduction,
    num_items: int | float | Tensor | None = None,
    label_smoothing: float = Settings.label_smoothing,
    z_loss: float = Settings.z_loss,
    token_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    softcap: float | None = Settings.softcap,
    temperature: float = Settings.temperature,
    gradient: str = Settings.gradient,
    eps: float = Settings.eps,
    seed: int | Tensor | None = None,
    backend: str = Settings.backend,
    max_buffer_bytes: int | None = Settings.max_buffer_bytes,
    check: bool | None = Settings.check,
    return_stats: bool = Settings.return_stats,
    hidden_variance: bool = Settings.hidden_variance,
    out_dtype: torch.dtype | None = Settings.out_dtype,
    return_z_loss: bool = Settings.return_z_loss,
) -> Tensor | tuple[Any, ...]:
    """Cross-entropy of a linear layer's logits, a drop-in for ``linear`` + ``cross_entropy``.

    The token loss is ``(1 - a) nll + a (lse - mean_v z_v) + z_loss * lse**2``, with
    ``a = label_smoothing``. With ``reduction="mean"`` or ``"sum"`` and a trained head the exact
    gradient is made in the forward pass and held until the backward. That takes 3G, or up to
    4G with the ``cpu`` and ``cuda`` backends if the byte budget is small.

    Args:
        reduction: ``"none"``, ``"sum"`` or ``"mean"``. The mean divides by the number of labelled
            tokens, also with ``token_weight`` (so that ``token_weight=c`` is DFT).
        num_items: a number, or a tensor of one element, that ``"mean"`` divides by instead: the
            labelled tokens of the whole optimizer step, over its micro-batches and ranks. 0 says
            that the step has no labels; see :func:`balanced_linear_cross_entropy`.
        label_smoothing: 0 to 1; ``gradient="exact"`` only.
        z_loss: factor of ``lse**2`` (PaLM, arXiv 2204.02311); ``gradient="exact"`` only.
        token_weight: a factor of each whole token loss, in target's shape. It is bfloat16, float16,
            float32 or float64, whatever the inputs are, and on their device. ``shift`` moves it
            along with the labels. It is a constant: if you need a gradient in the weights, use
            ``reduction="none"`` and multiply.
        class_weight: ``[V]``, torch's ``weight``, of the types of ``token_weight`` and as constant.
            The token loss is ``(1 - a) w_target nll + a mean_v w_v (lse - z_v) + z_loss * lse**2``,
            and the mean divides by the labelled tokens' sum of ``w_target`` (by 1 if that is 0).
            Smoothing or a z-loss makes the call one of 4G, and smoothing copies ``weight`` in the
            type of sums. Smoothing with a softcap makes it one of 8G, without that copy.
        return_z_loss: also return the part of the loss that ``z_loss`` makes, reduced as the loss
            is. It is detached (as in Liger): the loss contains it, and has its gradient.

    The other arguments, the statistics and the errors are those of :func:`linear_nll`.

    Returns:
        A scalar, or target's shape for ``"none"``; float32 (float64 for float64 inputs) or
        ``out_dtype``. With ``return_z_loss=True`` or ``return_stats=True`` a tuple: the loss, the
        part of the z-loss in the same type, :class:`TokenStats`, as far as they are asked for.
    """
    settings = Settings(
        ignore_index=ignore_index,
        shift=shift,
        softcap=softcap,
        temperature=temperature,
        gradient=gradient,
        eps=eps,
        backend=backend,
        max_buffer_bytes=max_buffer_bytes,
        check=check,
        return_stats=return_stats,
        hidden_variance=hidden_variance,
        out_dtype=out_dtype,
        return_z_loss=return_z_loss,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )
    _check_shift(shift, cu_seqlens)
    problem = make_problem(hidden, weight, target, bias, seed, settings, cu_seqlens, adapter)
    labelled = problem.labelled
    if token_weight is None:
        scale = labelled.to(problem.acc_dtype)
    else:
        scale = token_factor(token_weight, problem, target.shape)
    classes = None if class_weight is None else class_weights(class_weight, problem)
    if num_items is not None:
        if reduction != "mean":
            raise ValueError(
                f"num_items: got a number with reduction={reduction!r}, expected None: only 'mean' "
                "divides"
            )
        scale = torch.where(labelled, scale / _items_of(num_items, problem), 0.0)
    elif reduction == "mean":
        scale = scale / (labelled.sum().clamp_min(1) if classes is None else or_one(classes[1]))
    composed = classes is not None and (label_smoothing > 0 or z_loss > 0)
    if classes is not None and not composed:
        scale = scale * classes[1]
    result: Forward | WeightedLoss
    if classes is not None and composed:
        result, losses = with_class_weights(problem, *classes)
        loss = _reduced(weighted_losses(losses, scale), settings, target.shape)
    elif reduction != "none" and gradient == "exact" and problem.trains_head:
        result = ops.weighted_loss(problem, scale)
        loss = result.loss
    else:
        result = ops.linear_nll(problem)
        loss = _reduced(weighted_losses(result.loss, scale), settings, target.shape)
    found: list[Any] = [loss]
    if return_z_loss:
        part = z_loss * result.lse.detach().square()
        found.append(_reduced(weighted_losses(part, scale), settings, target.shape))
    found = [_rounded(value, settings) for value in found]
    if return_stats:
        found.append(token_stats(problem, result, target.shape))
    return tuple(found) if len(found) > 1 else found[0]


def _reduced(losses: Tensor, settings: Settings, shape: torch.Size) -> Tensor:
    """The sum of weighted losses ``[N]``, or all of them in target's ``shape``."""
    return losses.view(shape) if settings.reduction == "none" else losses.sum()


def _rounded(loss: Tensor, settings: Settings) -> Tensor:
    return loss if settings.out_dtype is None else loss.to(settings.out_dtype)


def balanced_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    ignore_index: int = Settings.ignore_index,
    shift: bool = Settings.shift,
    scheme: str | SchemeFunction = Settings.scheme,
    window: int = Settings.window,
    gamma: float = Settings.gamma,
    cu_seqlens: Tensor | None = None,
    normalize: str = Settings.normalize,
    num_items: int | float | Tensor | None = None,
    token_weight: Tensor | None = None,
    softcap: float | None = Settings.softcap,
    temperature: float = Settings.temperature,
    gradient: str = Settings.gradient,
    eps: float = Settings.eps,
    seed: int | Tensor | None = None,
    backend: str = Settings.backend,
    max_buffer_bytes: int | None = Settings.max_buffer_bytes,
    check: bool | None = Settings.check,
    return_stats: bool = Settings.return_stats,
    hidden_variance: bool = Settings.hidden_variance,
    out_dtype: torch.dtype | None = Settings.out_dtype,
) -> Tensor | tuple[Tensor, BalancedTokenStats]:
    """The Balanced Fine-Tuning loss (arXiv 2511.21075), with constant weights.

    ::

        L = (1/B) sum_b s_b ( sum_t w_bt nll_bt ) / T_b          normalize="sequence"
        L = ( sum_b s_b sum_t w_bt nll_bt ) / n                  normalize="token"

    over the labelled tokens of each document. A document without labels adds nothing and is not
    counted in ``B``. A batch without labels gives 0, attached to the graph.

    Args:
        scheme, window, gamma: see :func:`bft_kernels.weighting.token_weights`. A callable
            ``f(confidence, cu_seqlens) -> (token_weight, sequence_weight)`` gets labelled tokens.
        cu_seqlens: ``[S + 1]`` int32 or int64 over all flattened positions, ignored ones included.
            Without it each row of a 2-D ``target`` is one document, and a 1-D ``target`` is one.
            It may lie on the CPU while the tensors lie on a GPU. Then documents that fit the budget
            get their exact gradient in the forward pass (3G), as without ``cu_seqlens``, but no
            CUDA graph can capture the call.
        normalize: ``"sequence"`` or ``"token"``.
        num_items: the number to divide by: the documents (or labelled tokens) of the whole
            optimizer step, over its micro-batches and ranks. ``None`` counts this call's. It is at
            least 0: a number, or a tensor of one element, of any integer or float dtype and on any
            device. 0 says that the step has no labels: the loss is 0, and a label in the call is an
            error. On a GPU only ``check=True`` looks for such a label; otherwise the loss is not
            finite.
        token_weight: a factor of each token's loss after the scheme, in target's shape. It changes
            no window, no confidence and no number to divide by. It is a constant of any sign, and
            ``shift`` moves it along with the labels.

    The other arguments, the statistics and the errors are those of :func:`linear_nll`.

    Returns:
        A scalar, float32 (float64 for float64 inputs) or ``out_dtype``. With ``return_stats=True``:
        ``(loss, BalancedTokenStats)``.
    """
    settings = Settings(
        ignore_index=ignore_index,
        shift=shift,
        softcap=softcap,
        temperature=temperature,
        gradient=gradient,
        eps=eps,
        backend=backend,
        max_buffer_bytes=max_buffer_bytes,
        check=check,
        return_stats=return_stats,
        hidden_variance=hidden_variance,
        out_dtype=out_dtype,
        scheme=scheme,
        window=window,
        gamma=gamma,
        normalize=normalize,
    )
    problem = make_problem(hidden, weight, target, bias, seed, settings, cu_seqlens, adapter)
    if not isinstance(scheme, str):
        problem = replace(problem, settings=replace(settings, scheme=CALLABLE))
    boundaries = _boundaries_of(cu_seqlens, problem, target.shape)
    items = None if num_items is None else _items_of(num_items, problem)
    factor = None if token_weight is None else token_factor(token_weight, problem, target.shape)
    in_forward = gradient == "exact" and problem.trains_head
    local, labelled, layout = scheme in LOCAL_SCHEMES, problem.labelled, None
    if local and not return_stats:
        if normalize == "sequence":
            documents = _documents_of(boundaries, problem, target.shape)
            layout = labelled_layout(labelled, documents)
        scale = token_scales(labelled, layout, items, problem.acc_dtype)
        if factor is not None:
            scale = scale * factor
        if in_forward:
            return _rounded(ops.weighted_loss(problem, scale).loss, settings)
        nll = ops.linear_nll(problem).loss
        scale = scale * local_weighting(nll.detach(), labelled, scheme)
        return _rounded(weighted_losses(nll, scale).sum(), settings)
    documents = _documents_of(boundaries, problem, target.shape)
    on_host = boundaries is None or boundaries.device.type == "cpu"
    result: Forward | WeightedLoss
    weighting: BalancedLoss | WeightedLoss
    if in_forward and (local or (on_host and isinstance(scheme, str))):
        if normalize == "sequence":
            layout = labelled_layout(labelled, documents)
        scale = token_scales(labelled, layout, items, problem.acc_dtype)
        if factor is not None:
            scale = scale * factor
        if local:
            result = ops.weighted_loss(problem, scale)
            weighting = _balanced_loss(labelled, result.nll, documents, items, settings, layout)
        else:
            apart = boundaries is not None and boundaries.device != documents.device
            result = ops.weighted_loss(problem, scale, documents, boundaries if apart else None)
            weighting = result
        loss = result.loss
    else:
        result = ops.linear_nll(problem)
        weighting = _balanced_loss(labelled, result.loss, documents, items, settings)
        loss = weighting.loss
        if factor is not None:
            loss = weighted_losses(result.loss, weighting.coefficient * factor).sum()
    loss = _rounded(loss, settings)
    if not return_stats:
        return loss
    return loss, balanced_stats(token_stats(problem, result, target.shape), weighting, target.shape)


def _balanced_loss(
    labelled: Tensor,
    nll: Tensor,
    documents: Tensor,
    items: Tensor | None,
    settings: Settings,
    layout: Layout | None = None,
) -> BalancedLoss:
    """See :func:`bft_kernels.weighting.balanced_loss`.

    It is an op, unless the scheme is a callable or the ``layout`` is known on a CPU.
    """
    known = layout is not None and nll.device.type == "cpu" and not torch.compiler.is_compiling()
    if isinstance(settings.scheme, str) and not known:
        return ops.balanced_loss(nll, labelled, documents, items, settings)
    return balanced_loss(nll, labelled, documents, items, settings, layout)


def _boundaries_of(cu_seqlens: Tensor | None, problem: Problem, shape: torch.Size) -> Tensor | None:
    """``cu_seqlens [S + 1]`` as int64; ``None`` if the documents are the rows of ``shape``."""
    if cu_seqlens is not None:
        check_boundaries(cu_seqlens, problem.hidden.device)
        check = problem.settings.check
        # Reading boundaries on the CPU waits for no device.
        if check or (cu_seqlens.device.type == "cpu" and check is not False):
            return ops.documents(cu_seqlens, problem.target.numel())
        return cu_seqlens.long()
    if len(shape) > 2:
        raise ValueError(
            f"cu_seqlens: got None with a target of shape {tuple(shape)}, expected "
            "boundaries: only the rows of a 2-D target are documents by themselves"
        )
    return None


def _documents_of(boundaries: Tensor | None, problem: Problem, shape: torch.Size) -> Tensor:
    """``[S + 1]`` int64 on the tokens' device: the boundaries given, or those of the rows."""
    device = problem.hidden.device
    if boundaries is not None:
        return boundaries_beside(boundaries, device)
    rows = shape[0] if len(shape) == 2 else 1
    length = shape[-1] if shape else 1
    return torch.arange(rows + 1, dtype=torch.int64, device=device) * length


def _items_of(num_items: int | float | Tensor, problem: Problem) -> Tensor:
    """``num_items`` as a tensor ``[]`` on the tokens' device."""
    device = problem.hidden.device
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(
                f"num_items: got shape {tuple(num_items.shape)}, expected a number or a tensor []"
            )
        if num_items.dtype == torch.bool or num_items.is_complex():
            raise TypeError(f"num_items: got dtype {num_items.dtype}, expected a count")
        items = num_items.detach().reshape(())
    else:
        check_number("num_items", num_items, 0)
        items = torch.full((), float(num_items), dtype=problem.acc_dtype, device=device)
    if problem.settings.check or items.device.type == "cpu":
        return ops.num_items(items, problem.labelled, bool(problem.settings.check))
    return items.to(device)


def _check_shift(shift: object, cu_seqlens: object) -> None:
    if cu_seqlens is not None and not shift:
        raise ValueError(
            "cu_seqlens: got boundaries with shift=False, expected None: only a shift "
            "of the labels needs them here"
        )
