"""Token and sequence weights over packed documents (Balanced Fine-Tuning, arXiv 2511.21075).

Tensor code only: no Python loop over documents and no host synchronisation. Documents are given by
``cu_seqlens [S + 1]``, the cumulative lengths, and may be empty. All weights are constants to
autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bft_kernels.checks import (
    check_capture,
    check_confidence,
    check_cu_seqlens,
    check_tensor,
    check_weighting,
)
from bft_kernels.results import BalancedLoss

SchemeFunction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


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
    scheme: str | SchemeFunction = "bft",
    window: int = 256,
    gamma: float = 1.0,
    floor: float = 1e-8,
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
    clipped to its sequence.
    ``bft-v1*`` use full windows only, each reported at its first token (the last tokens report the
    last full window); a sequence shorter than ``g`` is one window. The released code takes a
    geometric mean where the paper's text says arithmetic; both are kept. ``sft`` and ``dft`` report
    the ``bft`` windows.

    Args:
        confidence: ``[n]`` float32 or float64, ``c = exp(-nll)`` of the labelled tokens only.
        cu_seqlens: ``[S + 1]`` int32 or int64 over those ``n`` tokens: starts at 0, ends at ``n``.
        scheme: a name above, or ``f(confidence, cu_seqlens) -> (token_weight, sequence_weight)``.
        window: the window's length ``g`` in labelled tokens.
        gamma: exponent of ``bft-v1-code``.
        floor: the ``delta`` added to ``bft``'s denominator.

    Raises:
        TypeError, ValueError: an argument is out of its domain; the message names it. The values of
            ``cu_seqlens`` are checked on the CPU only.

    Window sums keep a relative accuracy of 1e-6 in float32, for tiny confidences too: see
    :func:`window_sums`.
    """
    check_tensor("confidence", confidence, (None,), (torch.float32, torch.float64))
    check_cu_seqlens(cu_seqlens, confidence.numel(), confidence.device)
    check_weighting(scheme, window, gamma, floor)
    if confidence.device.type == "cpu" and not torch.compiler.is_compiling():
        check_confidence(confidence)
    return weigh(confidence, cu_seqlens, scheme=scheme, window=window, gamma=gamma, floor=floor)


@torch.no_grad()
def weigh(
    confidence: Tensor,  # [n]
    cu_seqlens: Tensor,  # [S + 1]; tokens past its end belong to no sequence and weigh 0
    *,
    scheme: str | SchemeFunction,
    window: int,
    gamma: float,
    floor: float = 1e-8,
    nll: Tensor | None = None,  # [n]
) -> TokenWeights:
    """:func:`token_weights` without its checks, and with room for padding behind the last token.

    ``nll`` says what a confidence too small for its type was.
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
        # A mean of logarithms is exact to its last digit only; its exponential needs it exact to
        # some absolute error, so the sum is float64 (where the device has it).
        wide = torch.float32 if confidence.device.type == "mps" else torch.float64
        values = confidence.to(wide).log() if nll is None else -nll.to(wide)
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
        token, per_sequence = (confidence / (local + floor)).clamp(0, 1), 1 - lowest
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
    """A callable's weights. It sees the tokens of the sequences, not the padding behind them,
    which takes one wait for the device where there is one.
    """
    check_capture(
        confidence.device, "scheme: got a callable", "a name: the host counts a callable's tokens"
    )
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
    token = torch.cat([token, token.new_zeros(padded - count)])
    return token, _from_callable("sequence_weight", result[1], like)


def _from_callable(name: str, value: Tensor, like: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != like.shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"scheme: its {name} has shape {got}, expected a tensor of {tuple(like.shape)}"
        )
    return value.detach().to(like)


def window_sums(values: Tensor, start: Tensor, length: Tensor, window: int) -> Tensor:
    """``out[i] = values[start[i] : start[i] + length[i]].sum()``, every ``length <= window``.

    Sums of ``2^k`` neighbours are built by doubling, and each window is put together from one such
    block per set bit of its length. A value takes part in at most ``2 log2(window)`` additions, all
    of one sign, so the relative error is at most that many units in the last place: under 1e-6 in
    float32 for a window of 256, however long the document and however small the values. Differences
    of prefix sums have no such bound: next to a confident passage they lose tiny sums altogether.

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


def boundaries_beside(cu_seqlens: Tensor, device: torch.device) -> Tensor:
    """``cu_seqlens`` as int64 on ``device``.

    Raises:
        RuntimeError: they would have to be copied while a CUDA graph is captured.
    """
    if cu_seqlens.device != device:
        check_capture(
            device,
            f"cu_seqlens: got a tensor on {cu_seqlens.device}",
            f"one on {device}: a replay would read freed memory. Move it there before the "
            "capture; rows of equal length need none",
        )
    return cu_seqlens.to(device, torch.int64, non_blocking=True)


# --- layouts: from what a batch brings to target and cu_seqlens ----------------------------------


def shift_labels(
    labels: Tensor, cu_seqlens: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """Aligns next-token labels with hidden states: ``target[b, t] = labels[b, t + 1]``.

    The last position of each row has nothing to predict and is ignored, and so is the last
    position of each document when ``cu_seqlens`` is given: a document's first token is never
    predicted from the document before it.

    Args:
        labels: ``[B, T]`` int64.
        cu_seqlens: ``[S + 1]`` over the flattened ``B * T`` positions.
        ignore_index: fills the positions without a target.

    Returns:
        ``target [B, T]`` int64.
    """
    check_tensor("labels", labels, (None, None), (torch.int64,))
    target = torch.full_like(labels, ignore_index)
    target[:, :-1] = labels[:, 1:]
    if cu_seqlens is None:
        return target
    check_cu_seqlens(cu_seqlens, labels.numel(), labels.device)
    position = torch.arange(labels.numel(), dtype=torch.int64, device=labels.device)
    ends = (boundaries_beside(cu_seqlens, labels.device) - 1).contiguous()
    found = ends[torch.searchsorted(ends, position).clamp(max=ends.numel() - 1)] == position
    return target.masked_fill(found.view_as(target), ignore_index)


def cu_seqlens_from_position_ids(position_ids: Tensor) -> Tensor:
    """Document boundaries of rows in which ``position_ids`` restart, as packing makes them.

    A document starts at the beginning of each row and wherever a position is not its
    predecessor's plus one. Padding becomes documents of its own, which hold no labels.

    Args:
        position_ids: ``[B, T]`` int64.

    Returns:
        ``cu_seqlens [S + 1]`` int64 over the flattened positions. On a CPU ``S`` is the number of
        documents; elsewhere ``S = B * T``, filled up with empty documents, so that the host need
        not wait for the count.
    """
    check_tensor("position_ids", position_ids, (None, None), (torch.int32, torch.int64))
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return _cu_seqlens_from_starts(starts)


def cu_seqlens_from_attention_mask(attention_mask: Tensor) -> Tensor:
    """Document boundaries from a mask: 1 or the document's number (1, 2, ...), 0 for padding.

    Args:
        attention_mask: ``[B, T]``, int or bool.

    Returns:
        ``cu_seqlens [S + 1]`` int64, as :func:`cu_seqlens_from_position_ids`.
    """
    check_tensor(
        "attention_mask", attention_mask, (None, None), (torch.bool, torch.int32, torch.int64)
    )
    starts = torch.ones_like(attention_mask, dtype=torch.bool)
    starts[:, 1:] = attention_mask[:, 1:] != attention_mask[:, :-1]
    return _cu_seqlens_from_starts(starts)


def _cu_seqlens_from_starts(starts: Tensor) -> Tensor:
    count = starts.numel()
    starts = starts.flatten()
    if starts.device.type == "cpu":
        first = starts.nonzero().squeeze(1)
    else:
        position = torch.arange(count, dtype=torch.int64, device=starts.device)
        first = torch.where(starts, position, count).sort().values
    return torch.cat([first, first.new_full((1,), count)])


class Layout(NamedTuple):
    """Where labelled tokens go when gaps of prompt and padding are closed up."""

    labelled: Tensor  # [N] bool
    slot: Tensor  # [N] int64, place among the labelled tokens; meaningless where ignored
    sequence: Tensor  # [N] int64, the document of each position
    cu_labelled: Tensor  # [S + 1] int64 over the labelled tokens

    def compact(self, values: Tensor) -> Tensor:
        """``[N] -> [N]``: labelled tokens first, in order; behind them zeros."""
        count = values.numel()
        slot = torch.where(self.labelled, self.slot, count)
        return values.new_zeros(count + 1).scatter(0, slot, values)[:count]

    def spread(self, compacted: Tensor) -> Tensor:
        """The inverse of :meth:`compact`, 0 where ignored."""
        if compacted.numel() == 0:
            return compacted.new_zeros(self.slot.shape)
        slot = self.slot.clamp(0, compacted.numel() - 1)
        return torch.where(self.labelled, compacted[slot], 0.0)


def labelled_layout(labelled: Tensor, cu_seqlens: Tensor) -> Layout:
    """The layout of flattened positions ``labelled [N]`` in documents ``cu_seqlens [S + 1]``."""
    cu = boundaries_beside(cu_seqlens, labelled.device)
    through = labelled.long().cumsum(0)
    before = torch.nn.functional.pad(through, (1, 0))
    position = torch.arange(labelled.numel(), dtype=torch.int64, device=labelled.device)
    sequence = torch.searchsorted(cu[1:].contiguous(), position, right=True)
    return Layout(labelled, through - 1, sequence, before[cu])


class Balanced(NamedTuple):
    """The weights of a batch in which not every position carries a label; 0 where ignored."""

    weight: Tensor  # [N], token weight times sequence weight
    token_weight: Tensor  # [N]
    window_confidence: Tensor  # [N]
    sequence_weight: Tensor  # [S]
    sequence_confidence: Tensor  # [S]


@torch.no_grad()
def balance(
    nll: Tensor,  # [N]
    layout: Layout,
    scheme: str | SchemeFunction,
    window: int,
    gamma: float,
    floor: float,
) -> Balanced:
    """Weights from token losses."""
    compacted = layout.compact(nll.detach())
    weights = weigh(
        torch.exp(-compacted),
        layout.cu_labelled,
        scheme=scheme,
        window=window,
        gamma=gamma,
        floor=floor,
        nll=compacted,
    )
    token = layout.spread(weights.token_weight)
    sequence = weights.sequence_weight
    return Balanced(
        token * sequence[layout.sequence] if sequence.numel() else token,
        token,
        layout.spread(weights.window_confidence),
        sequence,
        weights.sequence_confidence,
    )


def local_weights(nll: Tensor, labelled: Tensor, scheme: str) -> Tensor:
    """The weights of a scheme that is local to a token, ``[N]``: whatever the documents are."""
    if scheme == "sft":
        return labelled.to(nll.dtype)
    return torch.where(labelled, torch.exp(-nll), 0.0)


def sequence_shares(layout: Layout, dtype: torch.dtype) -> Tensor:
    """``1 / T_b`` for each position of document ``b`` of ``T_b`` labels, ``[N]``; 0 if ignored."""
    lengths = layout.cu_labelled.diff().clamp_min(1)
    if lengths.numel() == 0:
        return layout.labelled.to(dtype)
    return torch.where(layout.labelled, 1.0 / lengths[layout.sequence].to(dtype), 0.0)


def token_shares(
    labelled: Tensor, layout: Layout | None, num_items: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What multiplies each token's weight and loss, ``[N]``; 0 where ignored.

    Args:
        labelled: ``[N]`` bool.
        layout: of the documents, for ``1 / T_b`` over the number of documents with labels; ``None``
            for 1 over the number of labels.
        num_items: ``[]``, that number, if it is not this batch's.
    """
    if layout is not None:
        share = sequence_shares(layout, dtype)
        count = (layout.cu_labelled.diff() > 0).sum()
    else:
        share = labelled.to(dtype)
        count = labelled.sum()
    share = share / (count.clamp_min(1) if num_items is None else num_items)
    return torch.where(labelled, share, 0.0)  # num_items is 0 in a step without labels


def balanced_loss(
    loss: Tensor,  # [N], 0 where ignored
    labelled: Tensor,  # [N] bool
    cu_seqlens: Tensor,  # [S + 1] over the N positions
    num_items: Tensor | None,  # []
    normalize: str,
    scheme: str | SchemeFunction,
    window: int,
    gamma: float,
    floor: float,
) -> BalancedLoss:
    """The weighted sum of token losses, with constant weights made from those losses."""
    layout = labelled_layout(labelled, cu_seqlens)
    balanced = balance(loss, layout, scheme, window, gamma, floor)
    by_sequence = layout if normalize == "sequence" else None
    coefficient = token_shares(labelled, by_sequence, num_items, loss.dtype) * balanced.weight
    # Where a weight is 0 an infinite loss must not turn the sum into NaN.
    total = torch.where(coefficient != 0, coefficient * loss, 0).sum()
    return BalancedLoss(total, coefficient, *balanced[1:])
