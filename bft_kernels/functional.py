"""The public functions: per-token loss, reduced cross-entropy and the balanced loss.

All take ``hidden [..., D]``, ``weight [V, D]`` and ``target [...]``, already aligned (the shift of
next-token prediction is the caller's; see :func:`bft_kernels.weighting.shift_labels`). Logits exist
only in blocks of ``max_buffer_bytes``; sums over ``V`` and ``N`` and the gradients of blocks are
accumulated in float32, whatever the inputs (float64 inputs stay float64).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from bft_kernels import autograd as _autograd  # noqa: F401  registers the gradients
from bft_kernels import ops
from bft_kernels.checks import (
    FLOAT_DTYPES,
    check_boundaries,
    check_core,
    check_finite,
    check_int,
    check_positive,
    check_settings,
    check_tensor,
    check_weighting,
)
from bft_kernels.config import CoreConfig, Weighting, accumulator
from bft_kernels.plan import default_buffer_bytes
from bft_kernels.results import BalancedLoss, Forward, Wanted, WeightedLoss
from bft_kernels.weighting import (
    SchemeFunction,
    balanced_loss,
    labelled_layout,
    token_shares,
)


class TokenStats(NamedTuple):
    """Detached statistics in the shape of ``target``; 0 or False where ignored."""

    nll: Tensor  # float32
    lse: Tensor  # float32
    confidence: Tensor  # float32, exp(-nll)
    entropy: Tensor  # float32, nats
    correct: Tensor  # bool; ties go to the lowest index
    variance: Tensor | None = (
        None  # sampled: expected squared error of the row of dy, unit upstream
    )
    hidden_variance: Tensor | None = None  # the same for the row of dH, when asked for


class BalancedTokenStats(NamedTuple):
    """:class:`TokenStats` and the weights. Per-sequence fields are 0 for one without labels."""

    nll: Tensor
    lse: Tensor
    confidence: Tensor
    entropy: Tensor
    correct: Tensor
    variance: Tensor | None
    hidden_variance: Tensor | None
    window_confidence: Tensor  # target's shape
    token_weight: Tensor  # target's shape
    sequence_confidence: Tensor  # [S]
    sequence_weight: Tensor  # [S]


@dataclass(frozen=True)
class _Call:
    """A checked call: flattened tensors and settings."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    target: Tensor  # [N]
    bias: Tensor | None
    seed: int | Tensor | None
    gradient: str
    config: CoreConfig
    shape: torch.Size  # of the caller's target
    statistics: bool
    check: bool | None

    @property
    def trains_head(self) -> bool:
        bias = self.bias is not None and self.bias.requires_grad
        return torch.is_grad_enabled() and (self.weight.requires_grad or bias)

    @property
    def wanted(self) -> Wanted:
        bias = self.bias is not None and self.bias.requires_grad
        return Wanted(self.hidden.requires_grad, self.weight.requires_grad, bias)

    @property
    def labelled(self) -> Tensor:
        return self.target != self.config.ignore_index

    @property
    def wide(self) -> torch.dtype:
        return accumulator(self.hidden.dtype)


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
            ``None`` what lies on the CPU of targets, boundaries and ``num_items``.
        return_stats: also return :class:`TokenStats`.
        hidden_variance: with ``sampled``, also fill that statistic.

    Returns:
        ``[...]`` float32 (float64 for float64 inputs), or ``(nll, stats)``.

    Raises:
        TypeError, ValueError: an argument is out of its domain; the message names it.
        RuntimeError: the forced backend cannot run this; or ``create_graph=True`` in the backward.
    """
    call = _prepare(
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
    result = _run(call)
    loss = result.loss.view(call.shape)
    return (loss, _token_stats(call, result)) if return_stats else loss


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
    call = _prepare(
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
        _check_token_weight(token_weight, call)
        share = torch.where(call.labelled, token_weight.reshape(-1), 0).to(call.wide)
    if reduction == "mean":
        share = share / call.labelled.sum().clamp_min(1)
    if reduction != "none" and gradient == "exact" and call.trains_head:
        fused = _run_weighted(call, share, None, Weighting("sft"))
        loss, result = fused.loss, fused
    else:
        result = _run(call)
        # Where a weight is 0 an infinite loss must not turn the sum into NaN.
        loss = torch.where(share != 0, result.loss * share, 0)
        loss = loss.view(call.shape) if reduction == "none" else loss.sum()
    return (loss, _token_stats(call, result)) if return_stats else loss


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
            their exact gradient in the forward pass (3G) there as well.
        normalize: ``"sequence"`` or ``"token"``.
        num_items: what to divide by: the number of documents (or labelled tokens) of the whole
            optimizer step, over its micro-batches and ranks. ``None`` counts this call's.

    The other arguments, the statistics and the errors are those of :func:`linear_nll`.

    Returns:
        A scalar, float32 (float64 for float64 inputs). With ``return_stats=True``:
        ``(loss, BalancedTokenStats)``.
    """
    check_weighting(scheme, window, gamma, 1e-8)
    check_settings({"normalize": normalize})
    call = _prepare(
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
    documents = _documents(cu_seqlens, call)
    items = _items(num_items, call)
    inputs = (call.labelled, documents, items, normalize)
    settings = (scheme, window, gamma, Weighting.floor)
    weighting = Weighting(scheme, window, gamma) if isinstance(scheme, str) else None
    known = weighting is not None and (weighting.local or documents.device.type == "cpu")
    result: Forward | WeightedLoss
    if gradient == "exact" and call.trains_head and known:
        assert weighting is not None
        layout = labelled_layout(call.labelled, documents)
        share = token_shares(layout, normalize, items, call.wide)
        fused = _run_weighted(call, share, documents, weighting)
        loss, result = fused.loss, fused
        if not return_stats:
            return loss
        balanced = _balance(result.nll, inputs, settings, backend)
    else:
        result = _run(call)
        balanced = _balance(result.loss, inputs, settings, backend)
        loss = balanced.loss
        if not return_stats:
            return loss
    return loss, _balanced_stats(call, _token_stats(call, result), balanced)


def _prepare(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    temperature: float,
    gradient: str,
    eps: float,
    seed: int | Tensor | None,
    backend: str,
    max_buffer_bytes: int | None,
    check: bool | None,
    return_stats: bool,
    hidden_variance: bool,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> _Call:
    """Checks everything that needs no values, and flattens."""
    check_core(hidden, weight, target, bias)
    check_settings(
        {
            "ignore_index": ignore_index,
            "softcap": softcap,
            "temperature": temperature,
            "gradient": gradient,
            "eps": eps,
            "backend": backend,
            "max_buffer_bytes": max_buffer_bytes,
            "check": check,
            "return_stats": return_stats,
            "hidden_variance": hidden_variance,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
        }
    )
    seed = _check_seed(seed, hidden)
    device = hidden.device.type
    config = CoreConfig(
        ignore_index=ignore_index,
        softcap=None if softcap is None else float(softcap),
        temperature=float(temperature),
        label_smoothing=float(label_smoothing),
        z_loss=float(z_loss),
        eps=float(eps),
        residual="none",
        statistics=return_stats,
        variance=return_stats and gradient == "sampled",
        hidden_variance=return_stats and hidden_variance,
        operand=_operand(hidden, weight),
        backend=backend,
        max_buffer_bytes=max_buffer_bytes or default_buffer_bytes(device),
        check_values=device == "cpu" if check is None else check,
        check_finite=bool(check),
    )
    return _Call(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        target.reshape(-1),
        bias,
        seed,
        gradient,
        config,
        target.shape,
        return_stats,
        check,
    )


def _operand(hidden: Tensor, weight: Tensor) -> str:
    """Name of the type the products' operands are rounded to, as autocast would."""
    device = hidden.device.type
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    available = device != "meta"  # torch 2.8 does not trace torch.amp.is_autocast_available
    if dtype != torch.float64 and available and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return str(dtype).removeprefix("torch.")


def _check_seed(seed: object, hidden: Tensor) -> int | Tensor | None:
    if seed is None:
        return None
    if isinstance(seed, Tensor):
        check_tensor("seed", seed, (), (torch.int64,), hidden.device)
        return seed
    check_int("seed", seed, -(2**63))
    assert isinstance(seed, int)
    return seed


def _residual(call: _Call) -> str:
    """What the forward has to keep, from what requires a gradient."""
    if not torch.is_grad_enabled() or not any(call.wanted):
        return "none"
    if call.gradient == "sampled":
        return "entries"
    return "recompute" if call.trains_head else "unit"


def _run(call: _Call) -> Forward:
    config = replace(call.config, residual=_residual(call))
    seed = None
    if config.residual == "entries":
        seed = _seed_tensor(call.seed, call.hidden.device)
    return Forward(
        *ops.linear_nll(call.hidden, call.weight, call.target, call.bias, seed, *config.arguments())
    )


def _seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), device=device)
    if isinstance(seed, Tensor):
        return seed
    return torch.full((), seed, dtype=torch.int64, device=device)


def _run_weighted(
    call: _Call, share: Tensor, documents: Tensor | None, weighting: Weighting
) -> WeightedLoss:
    settings = (weighting.scheme, weighting.window, weighting.gamma, weighting.floor)
    config = replace(call.config, residual="recompute")
    return WeightedLoss(
        *ops.weighted_loss(
            call.hidden,
            call.weight,
            call.target,
            share,
            documents,
            call.bias,
            *config.arguments(),
            *settings,
            *call.wanted,
        )
    )


def _documents(cu_seqlens: Tensor | None, call: _Call) -> Tensor:
    """``[S + 1]`` int64; on the CPU where the boundaries are known without asking the device."""
    if cu_seqlens is not None:
        check_boundaries(cu_seqlens, call.hidden.device)
        # Looking at boundaries on the CPU waits for nothing.
        free = cu_seqlens.device.type == "cpu" and call.check is not False
        if free or call.check:
            return ops.documents(cu_seqlens, call.target.numel())
        return cu_seqlens.long()
    if len(call.shape) > 2:
        raise ValueError(
            f"cu_seqlens: got None with a target of shape {tuple(call.shape)}, expected "
            "boundaries: only the rows of a 2-D target are documents by themselves"
        )
    rows = call.shape[0] if len(call.shape) == 2 else 1
    length = call.shape[-1] if call.shape else 1
    return torch.arange(rows + 1, dtype=torch.int64) * length


def _balance(
    loss: Tensor,  # [N], without smoothing and z-loss: the nll
    inputs: tuple[Tensor, Tensor, Tensor | None, str],
    settings: tuple[str | SchemeFunction, int, float, float],
    backend: str,
) -> BalancedLoss:
    """See :func:`bft_kernels.weighting.balanced_loss`; an op, unless a callable must be seen."""
    if isinstance(settings[0], str):
        return BalancedLoss(*ops.balanced_loss(loss, *inputs, *settings, backend))
    return balanced_loss(loss, *inputs, *settings)


def _items(num_items: int | float | Tensor | None, call: _Call) -> Tensor | None:
    """``num_items`` as a tensor ``[]`` beside the tokens."""
    device = call.hidden.device
    if num_items is None:
        return None
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(
                f"num_items: got shape {tuple(num_items.shape)}, expected a number or a tensor []"
            )
        if num_items.dtype == torch.bool or num_items.is_complex():
            raise TypeError(f"num_items: got dtype {num_items.dtype}, expected a count")
        visible = call.config.check_values and num_items.device.type == "cpu"
        if visible and not torch.compiler.is_compiling():
            check_positive("num_items", float(num_items))
        return num_items.detach().reshape(()).to(device, non_blocking=True)
    check_positive("num_items", num_items)
    return torch.full((), float(num_items), dtype=call.wide, device=device)


def _check_token_weight(token_weight: object, call: _Call) -> None:
    check_tensor("token_weight", token_weight, call.shape, FLOAT_DTYPES, call.hidden.device)
    assert isinstance(token_weight, Tensor)
    if token_weight.requires_grad:
        raise ValueError(
            "token_weight: got a tensor that requires a gradient, expected a constant: detach it, "
            "or use reduction='none' and multiply"
        )
    if call.check and not torch.compiler.is_compiling():
        check_finite("token_weight", token_weight.reshape(-1, 1), rows=call.labelled)


def _token_stats(call: _Call, result: Forward | WeightedLoss) -> TokenStats:
    def shaped(values: Tensor) -> Tensor:
        return values.detach().view(call.shape)

    sampled = isinstance(result, Forward) and call.config.variance
    weighted = sampled and call.config.hidden_variance
    assert not sampled or isinstance(result, Forward)
    confidence = torch.where(call.labelled, torch.exp(-result.nll), 0.0)
    return TokenStats(
        nll=shaped(result.nll),
        lse=shaped(result.lse),
        confidence=shaped(confidence),
        entropy=shaped(result.entropy),
        correct=shaped(result.correct),
        variance=shaped(result.variance) if sampled else None,  # type: ignore[union-attr]
        hidden_variance=shaped(result.hidden_variance) if weighted else None,  # type: ignore[union-attr]
    )


def _balanced_stats(call: _Call, stats: TokenStats, balanced: BalancedLoss) -> BalancedTokenStats:
    return BalancedTokenStats(
        *stats,
        window_confidence=balanced.window_confidence.view(call.shape),
        token_weight=balanced.token_weight.view(call.shape),
        sequence_confidence=balanced.sequence_confidence,
        sequence_weight=balanced.sequence_weight,
    )
