"""The public functions: per-token loss, reduced cross-entropy and the balanced loss.

All take ``hidden [..., D]``, ``weight [V, D]`` and ``target [...]``, already aligned (the shift of
next-token prediction is the caller's; see :func:`bft_kernels.weighting.shift_labels`). Logits exist
only in blocks of ``max_buffer_bytes``; sums over ``V`` and ``N`` and the gradients of blocks are
accumulated in float32, whatever the inputs (float64 inputs stay float64). Products of float32 are
float32, whatever :func:`torch.set_float32_matmul_precision` and ``fp32_precision`` allow others;
autocast makes them narrow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bft_kernels.call import (
    balance,
    boundaries_of,
    check_token_weight,
    documents_of,
    items_of,
    prepare,
    run,
    run_weighted,
)
from bft_kernels.checks import check_settings, check_weighting
from bft_kernels.config import Weighting
from bft_kernels.results import Forward, WeightedLoss
from bft_kernels.token_stats import BalancedTokenStats, TokenStats, balanced_stats, token_stats
from bft_kernels.weighting import SchemeFunction, labelled_layout, token_shares


def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
    gradient: str = "exact",
    eps: float = 2**-12,
    seed: int | Tensor | None = None,
    backend: str = "auto",
    max_buffer_bytes: int | None = None,
    check: bool | None = None,
    return_stats: bool = False,
    hidden_variance: bool = False,
) -> Tensor | tuple[Tensor, TokenStats]:
    """``nll = logsumexp(z) - z[target]`` per token, ``z = softcap(hidden @ weight.T + bias) / T``.

    Differentiable for any upstream gradient in ``hidden``, ``weight`` and ``bias``.

    Args:
        hidden: ``[..., D]`` bfloat16, float16, float32 or float64.
        weight: ``[V, D]``, same device. May have another dtype, except that float64 is not mixed.
        target: ``[...]`` int64, ``0 <= target < V`` or ``ignore_index``.
        bias: ``[V]``. Entries of ``-inf`` mask columns of the vocabulary.
        ignore_index: tokens with this target cost nothing, give 0 and get no gradient.
        softcap: ``y -> softcap * tanh(y / softcap)`` before the temperature.
        temperature: divides the logits.
        gradient: ``"exact"``, or ``"sampled"``: an unbiased sparse estimate made in the forward
            pass (see :func:`bft_kernels.reference.sampled_gradient`).
        eps: ``sampled`` keeps entries of ``p >= eps`` for certain and others with probability
            ``p / eps``; at most ``1 / eps`` a token are expected.
        seed: of the sample: an int64, or an int64 tensor ``[]`` on the device. ``None`` draws one
            from torch's generator of that device.
        backend: ``"auto"`` or a backend's name, see :func:`bft_kernels.info`.
        max_buffer_bytes: budget of the blocks; 64 MiB on a CPU, 528 MiB on a GPU by default.
        check: ``True`` checks all values: targets, boundaries, and that labelled rows of
            ``hidden``, ``weight`` and ``bias`` are finite (waits for a GPU). ``False`` checks none,
            ``None`` what lies on the CPU of targets and boundaries. ``num_items`` is checked
            wherever it can be without waiting.
        return_stats: also return :class:`TokenStats`.
        hidden_variance: with ``sampled``, also fill that statistic.

    Returns:
        ``[...]`` float32 (float64 for float64 inputs), or ``(nll, stats)``.

    Raises:
        TypeError, ValueError: an argument is out of its domain; the message names it.
        RuntimeError: the forced backend cannot run this; ``create_graph=True`` in the backward; a
            call inside a transform of ``torch.func``; or an argument with a forward-mode tangent.
    """
    call = prepare(
        hidden,
        weight,
        target,
        bias=bias,
        ignore_index=ignore_index,
        softcap=softcap,
        temperature=temperature,
        gradient=gradient,
        eps=eps,
        seed=seed,
        backend=backend,
        max_buffer_bytes=max_buffer_bytes,
        check=check,
        return_stats=return_stats,
        hidden_variance=hidden_variance,
    )
    result = run(call)
    loss = result.loss.view(call.shape)
    return (loss, token_stats(call, result)) if return_stats else loss


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    gradient: str = "exact",
    eps: float = 2**-12,
    seed: int | Tensor | None = None,
    backend: str = "auto",
    max_buffer_bytes: int | None = None,
    check: bool | None = None,
    return_stats: bool = False,
    hidden_variance: bool = False,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Cross-entropy of a linear layer's logits, a drop-in for ``linear`` + ``cross_entropy``.

    The token loss is ``(1 - a) nll + a (lse - mean_v z_v) + z_loss * lse**2``, with
    ``a = label_smoothing``. With ``reduction="mean"`` or ``"sum"`` and a trained head the exact
    gradient is made in the forward pass (3G; on a CPU up to 4G where the byte budget is small) and
    held until the backward.

    Args:
        reduction: ``"none"``, ``"sum"``, or ``"mean"``: divided by the number of labelled tokens,
            also with ``token_weight`` (so that ``token_weight=c`` is DFT).
        label_smoothing: 0 to 1; ``gradient="exact"`` only.
        z_loss: factor of ``lse**2`` (PaLM, arXiv 2204.02311); ``gradient="exact"`` only.
        token_weight: target's shape, multiplies the whole token loss. A constant: for a gradient
            in the weights use ``reduction="none"`` and multiply.

    The other arguments, the statistics and the errors are those of :func:`linear_nll`.

    Returns:
        A scalar, or target's shape for ``"none"``; float32 (float64 for float64 inputs). With
        ``return_stats=True``: ``(loss, TokenStats)``.
    """
    check_settings({"reduction": reduction})
    result: Forward | WeightedLoss
    call = prepare(
        hidden,
        weight,
        target,
        bias=bias,
        ignore_index=ignore_index,
        softcap=softcap,
        temperature=temperature,
        gradient=gradient,
        eps=eps,
        seed=seed,
        backend=backend,
        max_buffer_bytes=max_buffer_bytes,
        check=check,
        return_stats=return_stats,
        hidden_variance=hidden_variance,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )
    share = call.labelled.to(call.wide)
    if token_weight is not None:
        check_token_weight(token_weight, call)
        share = torch.where(call.labelled, token_weight.reshape(-1), 0).to(call.wide)
    if reduction == "mean":
        share = share / call.labelled.sum().clamp_min(1)
    if reduction != "none" and gradient == "exact" and call.trains_head:
        fused = run_weighted(call, share, None, None, Weighting("sft"))
        loss, result = fused.loss, fused
    else:
        result = run(call)
        # Where a weight is 0 an infinite loss must not turn the sum into NaN.
        loss = torch.where(share != 0, result.loss * share, 0)
        loss = loss.view(call.shape) if reduction == "none" else loss.sum()
    return (loss, token_stats(call, result)) if return_stats else loss


def balanced_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    scheme: str | SchemeFunction = "bft",
    window: int = 256,
    gamma: float = 1.0,
    cu_seqlens: Tensor | None = None,
    normalize: str = "sequence",
    num_items: int | float | Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    gradient: str = "exact",
    eps: float = 2**-12,
    seed: int | Tensor | None = None,
    backend: str = "auto",
    max_buffer_bytes: int | None = None,
    check: bool | None = None,
    return_stats: bool = False,
    hidden_variance: bool = False,
) -> Tensor | tuple[Tensor, BalancedTokenStats]:
    """The Balanced Fine-Tuning loss (arXiv 2511.21075), with constant weights.

    ::

        L = (1/B) sum_b s_b ( sum_t w_bt nll_bt ) / T_b          normalize="sequence"
        L = ( sum_b s_b sum_t w_bt nll_bt ) / n                  normalize="token"

    over the labelled tokens of each document. A document without labels adds nothing and is not
    counted in ``B``; a batch without any gives 0, attached to the graph.

    Args:
        scheme, window, gamma: see :func:`bft_kernels.weighting.token_weights`. A callable
            ``f(confidence, cu_seqlens) -> (token_weight, sequence_weight)`` sees labelled tokens.
        cu_seqlens: ``[S + 1]`` int32 or int64 over all flattened positions, ignored ones included.
            Without it each row of a 2-D ``target`` is one document, and a 1-D ``target`` is one.
            It may lie on the CPU with tensors on a GPU: then documents that fit the budget get
            their exact gradient in the forward pass (3G) there as well, but no CUDA graph takes it.
        normalize: ``"sequence"`` or ``"token"``.
        num_items: what to divide by: the number of documents (or labelled tokens) of the whole
            optimizer step, over its micro-batches and ranks. ``None`` counts this call's. 0 says
            that the step has no labels: the loss is 0, and a label in the call is an error (on a
            GPU it is looked for with ``check=True`` only; without, the loss is not finite).

    The other arguments, the statistics and the errors are those of :func:`linear_nll`.

    Returns:
        A scalar, float32 (float64 for float64 inputs). With ``return_stats=True``:
        ``(loss, BalancedTokenStats)``.
    """
    check_weighting(scheme, window, gamma, 1e-8)
    check_settings({"normalize": normalize})
    call = prepare(
        hidden,
        weight,
        target,
        bias=bias,
        ignore_index=ignore_index,
        softcap=softcap,
        temperature=temperature,
        gradient=gradient,
        eps=eps,
        seed=seed,
        backend=backend,
        max_buffer_bytes=max_buffer_bytes,
        check=check,
        return_stats=return_stats,
        hidden_variance=hidden_variance,
    )
    boundaries = boundaries_of(cu_seqlens, call)
    items = items_of(num_items, call)
    weighting = Weighting(scheme, window, gamma) if isinstance(scheme, str) else None
    on_host = boundaries is None or boundaries.device.type == "cpu"
    known = weighting is not None and (weighting.local or on_host)
    fused = weighting if gradient == "exact" and call.trains_head and known else None
    if fused is not None and fused.local and normalize == "token" and not return_stats:
        share = token_shares(call.labelled, None, items, call.wide)
        return run_weighted(call, share, None, None, fused).loss
    documents = documents_of(boundaries, call)
    inputs = (call.labelled, documents, items, normalize)
    settings = (scheme, window, gamma, Weighting.floor)
    result: Forward | WeightedLoss
    if fused is not None:
        layout = labelled_layout(call.labelled, documents) if normalize == "sequence" else None
        share = token_shares(call.labelled, layout, items, call.wide)
        apart = boundaries is not None and boundaries.device != documents.device
        result = run_weighted(call, share, documents, boundaries if apart else None, fused)
        loss = result.loss
        if not return_stats:
            return loss
        balanced = balance(result.nll, inputs, settings, backend)
    else:
        result = run(call)
        balanced = balance(result.loss, inputs, settings, backend)
        loss = balanced.loss
        if not return_stats:
            return loss
    return loss, balanced_stats(call, token_stats(call, result), balanced)
