"""Token and sequence weights over packed documents (Balanced Fine-Tuning, arXiv 2511.21075).

This is tensor code without a Python loop over documents. Only a callable scheme makes the host wait
for the device. ``cu_seqlens [S + 1]``, the cumulative lengths, say where documents lie; documents
may be empty. Autograd takes all weights as constants.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bft_kernels.checks import (
    check_capture,
    check_confidence,
    check_cu_seqlens,
    check_finite,
    check_tensor,
)
from bft_kernels.documents import (
    Layout,
    boundaries_beside,
    cu_seqlens_from_attention_mask,
    cu_seqlens_from_position_ids,
    labelled_layout,
    shift_labels,
    token_scales,
)
from bft_kernels.results import BalancedLoss
from bft_kernels.settings import SchemeFunction, Settings, check_scheme, check_scheme_call
from bft_kernels.values import check_int, check_positive

__all__ = [
    "TokenWeights",
    "cu_seqlens_from_attention_mask",
    "cu_seqlens_from_position_ids",
    "shift_labels",
    "token_weights",
]

# ``bft`` adds this to the denominator of a token weight.
DELTA = 1e-8


class TokenWeights(NamedTuple):
    """What :func:`token_weights` returns, in the dtype of ``confidence``."""

    token_weight: Tensor  # [n], w
    window_confidence: Tensor  # [n], mean confidence of the token's window
    sequence_weight: Tensor  # [S], s; 0 for a sequence without tokens
    sequence_confidence: Tensor  # [S], the lowest window confidence; 0 without tokens


def token_weights(
    confidence: Tensor,
    cu_seqlens: Tensor,
    *,
    scheme: str | SchemeFunction = Settings.scheme,
    window: int = Settings.window,
    gamma: float = Settings.gamma,
    floor: float = DELTA,
) -> TokenWeights:
    """Weights of labelled tokens from their confidences.

    =============== ========================= =================================== =============
    scheme          token weight ``w``        sequence weight ``s``               source
    =============== ========================= =================================== =============
    ``sft``         1                         1
    ``dft``         ``c``                     1                                   2508.05629
    ``bft``         ``clip(c/(C+floor),0,1)`` ``1 - min C``                       BFT v3
    ``bft-v1``      ``c``                     ``1 - min C`` of full windows       BFT v1, v2
    ``bft-v1-code`` ``c``                     ``1 - clamp(min C)**gamma``         released code
    =============== ========================= =================================== =============

    ``C`` is the window's mean. ``bft``'s window of token ``t`` is ``[t - g//2, t + g - g//2 - 1]``,
    clipped to its sequence. ``bft-v1*`` use full windows only, and a sequence shorter than ``g`` is
    one window. Each window is reported at its first token; the last tokens report the last full
    window. The released code takes a geometric mean, but the paper's text says arithmetic; both are
    kept. ``sft`` and ``dft`` report the ``bft`` windows.

    Args:
        confidence: ``[n]`` float32 or float64, ``c = exp(-nll)`` of the labelled tokens only.
        cu_seqlens: ``[S + 1]`` int32 or int64 over those ``n`` tokens: starts at 0, ends at ``n``.
        scheme: a name above, or ``f(confidence, cu_seqlens) -> (token_weight, sequence_weight)``.
        window: the window's length ``g`` in labelled tokens.
        gamma: exponent of ``bft-v1-code``.
        floor: the ``delta`` added to ``bft``'s denominator.

    Returns:
        :class:`TokenWeights`, in the dtype and on the device of ``confidence``. They are constants.

    Raises:
        TypeError, ValueError: an argument is out of its domain, or a callable did not return two
            tensors of the right shapes; the message names it. Values of tensors are checked on the
            CPU only.
        RuntimeError: ``scheme`` is a callable, or ``cu_seqlens`` would have to be copied, while a
            CUDA graph is captured.

    Window sums keep a relative accuracy of 1e-6 in float32, also for tiny confidences (see
    :func:`window_sums`).
    """
    check_tensor("confidence", confidence, ("n",), (torch.float32, torch.float64))
    check_cu_seqlens(cu_seqlens, confidence.numel(), confidence.device)
    check_scheme("scheme", scheme)
    check_int("window", window, 1)
    check_positive("gamma", gamma)
    check_positive("floor", floor)
    if confidence.device.type == "cpu" and not torch.compiler.is_compiling():
        check_confidence(confidence)
    return weigh(confidence, cu_seqlens, scheme=scheme, window=window, gamma=gamma, delta=floor)


@torch.no_grad()
def weigh(
    confidence: Tensor,  # [n]
    cu_seqlens: Tensor,  # [S + 1]; tokens past its end belong to no sequence and weigh 0
    *,
    scheme: str | SchemeFunction,
    window: int,
    gamma: float,
    delta: float = DELTA,
    nll: Tensor | None = None,  # [n]
) -> TokenWeights:
    """:func:`token_weights` without its checks, and with room for padding behind the last token.

    ``nll`` keeps the digits of a confidence that is too small for its type.
    """
    confidence = confidence.detach()  # no_grad leaves a tangent of forward mode
    count = confidence.numel()
    sequences = cu_seqlens.numel() - 1
    cu = boundaries_beside(cu_seqlens, confidence.device)
    position = torch.arange(count, dtype=torch.int64, device=confidence.device)
    # Padding goes to one extra sequence, which the results leave out again.
    sequence = torch.searchsorted(cu[1:].contiguous(), position, right=True)
    bounds = torch.cat([cu, cu.new_full((1,), count)])
    first, stop = bounds[sequence], bounds[sequence + 1]

    name = scheme if isinstance(scheme, str) else "bft"
    if name.startswith("bft-v1"):
        length = torch.minimum(stop - first, first.new_full((), window))
        start = torch.minimum(position, stop - length)
    else:
        start = torch.maximum(position - window // 2, first)
        length = torch.minimum(position + (window - window // 2), stop) - start
    if name == "bft-v1-code":
        # Rounding makes a relative error in a mean of logarithms, but its exponential needs a
        # small absolute error. So the sum is float64, where the device has it.
        acc_dtype = torch.float32 if confidence.device.type == "mps" else torch.float64
        values = confidence.to(acc_dtype).log() if nll is None else -nll.to(acc_dtype)
        local = (window_sums(values, start, length, window) / length).exp().to(confidence.dtype)
    else:
        local = window_sums(confidence, start, length, window) / length

    lowest = confidence.new_full((sequences + 1,), torch.inf)
    lowest = lowest.scatter_reduce(0, sequence, local, "amin")[:sequences]
    filled = cu[1:] > cu[:-1]
    lowest = torch.where(filled, lowest, 0.0)

    token, per_sequence = torch.ones_like(confidence), torch.ones_like(lowest)
    if not isinstance(scheme, str):
        token, per_sequence = _call_scheme(scheme, confidence, cu_seqlens, lowest)
    elif scheme == "bft":
        token, per_sequence = (confidence / (local + delta)).clamp(0, 1), 1 - lowest
    elif scheme == "bft-v1-code":
        token, per_sequence = confidence, 1 - lowest.clamp(0, 1) ** gamma
    elif scheme == "bft-v1":
        token, per_sequence = confidence, 1 - lowest
    elif scheme == "dft":
        token = confidence
    inside = sequence < sequences
    return TokenWeights(
        torch.where(inside, token, 0.0),
        torch.where(inside, local, 0.0),
        torch.where(filled, per_sequence, 0.0),
        lowest,
    )


def _call_scheme(
    scheme: SchemeFunction, confidence: Tensor, cu_seqlens: Tensor, like: Tensor
) -> tuple[Tensor, Tensor]:
    """A callable's weights.

    The callable sees the tokens of the sequences, not the padding behind them. To count them, the
    host waits once for the device, if there is one.
    """
    check_capture(
        confidence.device, "scheme: got a callable", "a name: the host counts a callable's tokens"
    )
    compiling = torch.compiler.is_compiling()
    if not compiling:
        check_scheme_call(scheme)
    padded = confidence.shape[0]
    count = int(cu_seqlens[-1])
    torch._check(count >= 0)  # for a count that tracing does not know
    torch._check(count <= padded)
    seen = confidence.narrow(0, 0, count)
    result = scheme(seen, cu_seqlens)
    if not isinstance(result, tuple) or len(result) != 2:
        raise ValueError(
            f"scheme: returned {type(result).__name__}, expected (token_weight, sequence_weight)"
        )
    token = _from_callable("token_weight", result[0], seen)
    sequence = _from_callable("sequence_weight", result[1], like)
    # On a device the host would wait; of a confidence that is NaN the loss itself tells.
    if confidence.device.type == "cpu" and not compiling and bool(seen.isfinite().all()):
        filled = (cu_seqlens[1:] > cu_seqlens[:-1]).to(like.device)
        check_finite("scheme: its token_weight", token)
        check_finite("scheme: its sequence_weight", torch.where(filled, sequence, 0))
    token = torch.cat([token, token.new_zeros(padded - count)])
    return token, sequence


def _from_callable(name: str, value: Tensor, like: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != like.shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"scheme: its {name} has shape {got}, expected a tensor of {tuple(like.shape)}"
        )
    return value.detach().to(like)


def window_sums(values: Tensor, start: Tensor, length: Tensor, window: int) -> Tensor:
    """``out[i] = values[start[i] : start[i] + length[i]].sum()``, for every ``length <= window``.

    Sums of ``2^k`` neighbours are built by doubling. Each window is put together from one such
    block per set bit of its length. A value takes part in at most ``2 log2(window)`` additions, and
    all values have one sign, so the relative error is at most that many units in the last place.
    For a window of 256 that is under 1e-6 in float32, however long the document and however small
    the values. Differences of prefix sums have no such bound: next to a confident passage they lose
    tiny sums altogether.

    Args:
        values: ``[n]``, of one sign.
        start, length: ``[n]`` int64.
        window: the largest length, on the host (it bounds the number of passes).

    Returns:
        ``[n]`` in the dtype of ``values``.
    """
    total = torch.zeros_like(values)
    if values.numel() == 0:
        return total
    last = values.numel() - 1
    block, size = values, 1  # block[i] = values[i : i + size].sum(), where that lies inside
    position = start
    while size <= min(window, values.numel()):
        take = (length & size) != 0
        total = torch.where(take, total + block[position.clamp(0, last)], total)
        position = torch.where(take, position + size, position)
        block = block + torch.nn.functional.pad(block[size:], (0, min(size, block.numel())))
        size *= 2
    return total


class Weighting(NamedTuple):
    """The weights of a batch in which not every position carries a label; 0 where ignored."""

    weight: Tensor  # [N], token weight times sequence weight
    token_weight: Tensor  # [N]
    window_confidence: Tensor  # [N]
    sequence_weight: Tensor  # [S]
    sequence_confidence: Tensor  # [S]


@torch.no_grad()
def balance(
    nll: Tensor,  # [N]
    labelled: Tensor | None,  # [N] bool; None: every position carries a label
    cu_seqlens: Tensor,  # [S + 1] over the N positions
    settings: Settings,
    layout: Layout | None = None,  # of labelled, if it is known
) -> Weighting:
    """Weights from token losses."""
    nll = nll.detach()
    if layout is None and labelled is not None:
        layout = labelled_layout(labelled, cu_seqlens)
    compacted = nll if layout is None else layout.compact(nll)
    cu_labelled = cu_seqlens if layout is None else layout.cu_labelled
    weighting = weigh(
        torch.exp(-compacted),
        cu_labelled,
        scheme=settings.scheme,
        window=settings.window,
        gamma=settings.gamma,
        nll=compacted,
    )
    token, window_confidence = weighting.token_weight, weighting.window_confidence
    sequence_weight = weighting.sequence_weight
    if layout is not None:
        token, window_confidence = layout.spread(token), layout.spread(window_confidence)
        of_token = layout.sequence
    else:
        of_token = torch.repeat_interleave(cu_labelled.diff(), output_size=nll.numel())
    joint = token * sequence_weight[of_token] if sequence_weight.numel() else token
    return Weighting(
        joint, token, window_confidence, sequence_weight, weighting.sequence_confidence
    )


def local_weighting(nll: Tensor, labelled: Tensor, scheme: object) -> Tensor:
    """Weights ``[N]`` that need no documents: the confidence for ``dft``, else 1; 0 if ignored."""
    if scheme == "dft":
        return torch.where(labelled, torch.exp(-nll), 0.0)
    return labelled.to(nll.dtype)


def weighted_losses(loss: Tensor, coefficient: Tensor) -> Tensor:
    """``loss * coefficient [N]``, and 0 where the coefficient is 0, even for an infinite loss."""
    return torch.where(coefficient != 0, loss * coefficient, 0)


def balanced_loss(
    loss: Tensor,  # [N], 0 where ignored
    labelled: Tensor,  # [N] bool
    cu_seqlens: Tensor,  # [S + 1] over the N positions
    num_items: Tensor | None,  # []
    settings: Settings,
    layout: Layout | None = None,  # of labelled, if it is known
) -> BalancedLoss:
    """The weighted sum of token losses, with constant weights made from those losses."""
    layout = layout or labelled_layout(labelled, cu_seqlens)
    weighting = balance(loss, labelled, cu_seqlens, settings, layout)
    by_sequence = layout if settings.normalize == "sequence" else None
    scale = token_scales(labelled, by_sequence, num_items, loss.dtype)
    coefficient = scale * weighting.weight
    total = weighted_losses(loss, coefficient).sum()
    return BalancedLoss(total, coefficient, *weighting[1:])
