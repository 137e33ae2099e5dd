"""The specification in plain PyTorch: core op, weights, both gradients and the sampling hash.

This code is written to be read. It runs in any floating dtype, and its float64 results are the
tests' truth. It holds the full ``[N, V]`` logits and loops over sequences in Python. Nothing else
in the package repeats these formulas, and nothing here imports the fast code.

Notation: ``N`` tokens, ``D`` hidden size, ``V`` vocabulary size, ``y = hidden @ weight.T + bias``,
``z = softcap(y) / temperature``, ``p = softmax(z)``, ``nll = logsumexp(z) - z[target]``,
confidence ``c = exp(-nll)``.

A low-rank adapter ``(a [N, r], b [V, r])`` of the head adds ``a @ b.T`` to ``y``. All of this
module holds for it with ``[hidden | a]`` in the place of ``hidden`` and ``[weight | b]`` in that of
``weight``, and gradients split likewise. Only the certificate of ``dH`` stays that of ``weight``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Scheme = str | Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


# --- the core op ---------------------------------------------------------------------------------


def logits(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None = None,  # [V]
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:  # [N, V]
    """``softcap(hidden @ weight.T + bias) / temperature``."""
    y = hidden @ weight.T
    if bias is not None:
        y = y + bias
    if softcap is not None:
        y = softcap * torch.tanh(y / softcap)
    return y / temperature


def linear_nll(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [N]
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    class_weight: Tensor | None = None,  # [V]
) -> Tensor:  # [N], 0 where ignored
    """``(1 - a) nll + a (lse - mean_v z_v) + z_loss * lse**2`` with ``a = label_smoothing``.

    With class weights ``w`` it is ``(1 - a) w_target nll + a mean_v w_v (lse - z_v) + ...``.
    Autograd differentiates it, and ``gradient="exact"`` must return that derivative.
    """
    labelled = target != ignore_index
    z = logits(hidden[labelled], weight, bias, softcap, temperature)
    lse = torch.logsumexp(z, dim=-1)
    nll = lse - z.gather(1, target[labelled, None]).squeeze(1)
    w = z.new_ones(z.shape[1]) if class_weight is None else class_weight.to(z)
    loss = (1 - label_smoothing) * w[target[labelled]] * nll + z_loss * lse**2
    if label_smoothing:  # else a logit of -inf, a masked column, would make 0 * inf
        loss = loss + label_smoothing * (w * (lse[:, None] - z)).mean(dim=-1)
    return hidden.new_zeros(target.shape, dtype=loss.dtype).masked_scatter(labelled, loss)


def token_stats(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [N], every token labelled
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """``nll, lse, confidence, entropy, correct``, each ``[N]``. Ties go to the lowest index."""
    z = logits(hidden, weight, bias, softcap, temperature)
    log_p = torch.log_softmax(z, dim=-1)
    nll = -log_p.gather(1, target[:, None]).squeeze(1)
    first_maximum = (z == z.max(dim=-1, keepdim=True).values).int().argmax(dim=-1)
    return {
        "nll": nll,
        "lse": torch.logsumexp(z, dim=-1),
        "confidence": torch.exp(-nll),
        "entropy": torch.special.entr(log_p.exp()).sum(dim=-1),
        "correct": first_maximum == target,
    }


def top_k(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    k: int,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:  # [N, k] each
    """Ids and log-probabilities of the most probable tokens. Ties go to the lowest index."""
    z = logits(hidden, weight, bias, softcap, temperature)
    ids = z.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return ids, torch.log_softmax(z, dim=-1).gather(1, ids)


# --- the weights ---------------------------------------------------------------------------------


def window_means(values: Sequence[float], window: int, scheme: str) -> list[float]:
    """The means of one sequence's windows.

    ``bft`` has one for each token ``t``, ``[t - g//2, t + g - g//2 - 1]``, clipped at the ends.
    ``bft-v1`` has only full windows, listed by their first token; a sequence shorter than ``g`` is
    one window.
    """
    count = len(values)
    if scheme == "bft":
        spans = [
            (max(0, t - window // 2), min(count, t + window - window // 2)) for t in range(count)
        ]
    else:
        length = min(window, count)
        spans = [(t, t + length) for t in range(count - length + 1)]
    return [math.fsum(values[first:stop]) / (stop - first) for first, stop in spans]


def sequence_weights(
    confidence: Tensor,  # [T], one sequence, labelled tokens only
    scheme: str,
    window: int = 256,
    gamma: float = 1.0,
    delta: float = 1e-8,
) -> tuple[Tensor, float]:
    """Token weights ``w [T]`` and the sequence weight ``s`` of one sequence.

    ``dft``: arXiv 2508.05629. ``bft``: arXiv 2511.21075 v3. ``bft-v1``: the text of its v1 and v2.
    ``bft-v1-code``: the authors' released code, whose window mean is geometric.
    """
    c = confidence.double().tolist()
    if scheme == "sft":
        return torch.ones_like(confidence), 1.0
    if scheme == "dft":
        return confidence, 1.0
    if scheme == "bft":
        local = window_means(c, window, "bft")
        ratio = [a / (b + delta) for a, b in zip(c, local, strict=True)]
        return confidence.new_tensor([min(max(r, 0.0), 1.0) for r in ratio]), 1.0 - min(local)
    if scheme == "bft-v1":
        return confidence, 1.0 - min(window_means(c, window, "bft-v1"))
    if scheme == "bft-v1-code":
        log_c = [math.log(x) if x > 0 else -math.inf for x in c]
        lowest = min(window_means(log_c, window, "bft-v1"))
        return confidence, 1.0 - min(max(math.exp(lowest), 0.0), 1.0) ** gamma
    raise ValueError(f"scheme: got {scheme!r}")


def token_coefficients(
    confidence: Tensor,  # [n], labelled tokens only
    cu_seqlens: Tensor,  # [S + 1] over those n
    *,
    scheme: Scheme = "bft",
    window: int = 256,
    gamma: float = 1.0,
    delta: float = 1e-8,
    normalize: str = "sequence",
    num_items: float | None = None,
) -> Tensor:  # [n]
    """The constant factor of each nll: ``s w / (T B)``, or ``s w / n`` for ``"token"``."""
    bounds = cu_seqlens.tolist()
    lengths = [stop - first for first, stop in itertools.pairwise(bounds)]
    sequences = sum(length > 0 for length in lengths)
    coefficient = torch.zeros_like(confidence)
    own = scheme(confidence, cu_seqlens) if callable(scheme) else None
    for s, (first, length) in enumerate(zip(bounds, lengths, strict=False)):
        if length == 0:
            continue
        part = slice(first, first + length)
        if own is not None:
            w, sequence_weight = own[0][part], float(own[1][s])
        else:
            assert isinstance(scheme, str)
            w, sequence_weight = sequence_weights(confidence[part], scheme, window, gamma, delta)
        token_scale = length if normalize == "sequence" else 1
        coefficient[part] = sequence_weight * w / token_scale
    count = sequences if normalize == "sequence" else len(confidence)
    return coefficient / (num_items if num_items is not None else max(count, 1))


def balanced_linear_cross_entropy(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [N]
    cu_seqlens: Tensor,  # [S + 1] over all N positions
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
    token_weight: Tensor | None = None,  # [N], a factor of each token's loss after the scheme
    **weighting: object,  # as in token_coefficients
) -> Tensor:
    """``L = (1/B) sum_b s_b (sum_t w_bt nll_bt) / T_b`` with constant weights, a scalar."""
    nll = linear_nll(
        hidden,
        weight,
        target,
        bias=bias,
        ignore_index=ignore_index,
        softcap=softcap,
        temperature=temperature,
    )
    labelled = target != ignore_index
    before = torch.cat([labelled.new_zeros(1, dtype=torch.int64), labelled.long().cumsum(0)])
    nll = nll[labelled]
    confidence = torch.exp(-nll.detach())
    coefficient = token_coefficients(confidence, before[cu_seqlens.long()], **weighting)  # type: ignore[arg-type]
    if token_weight is not None:
        coefficient = coefficient * token_weight[labelled]
    return (coefficient * nll).sum()


# --- the sampled gradient ------------------------------------------------------------------------

_MASK32 = (1 << 32) - 1
_MASK64 = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15


def mix64(z: int) -> int:
    """The splitmix64 finaliser, a bijection of 64-bit words."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def row_key(seed: int, row: int) -> tuple[int, int]:
    """The odd 32-bit multiplier and the 32-bit offset of one row's draws."""
    key = mix64((mix64((seed + GAMMA) & _MASK64) + GAMMA * row) & _MASK64)
    return key >> 32 | 1, key & _MASK32


def uniforms(seed: int, rows: Sequence[int], columns: Tensor) -> Tensor:
    """``u [len(rows), len(columns)]``, float32 in (0, 1]: the draw of entry (row, column).

    Every backend reproduces this definition bit for bit. The arithmetic is unsigned, modulo 2^64
    for the row's key and modulo 2^32 for the entry::

        mix64(z): z ^= z >> 30; z *= 0xBF58476D1CE4E5B9; z ^= z >> 27; z *= 0x94D049BB133111EB;
                  z ^= z >> 31
        mix32(x): x ^= x >> 16; x *= 0x7FEB352D; x ^= x >> 15; x *= 0x846CA68B; x ^= x >> 16
        key = mix64(mix64(seed + GAMMA) + GAMMA * row)      GAMMA = 0x9E3779B97F4A7C15
        x = mix32(((key >> 32) | 1) * column + (key & 0xFFFFFFFF))
        u = (float32(x >> 8) + 0.5) * 2^-24                 float32, round to nearest even

    ``seed`` is the two's complement of an int64, ``row`` is a position in the flattened input, and
    ``column`` is a vocabulary index. The row's key is a multiplier *and* an offset. With only an
    offset (or an exclusive or), rows whose keys lie within ``V`` of each other would draw shifted
    copies of each other. In a batch of 2048 rows that would happen to more than a hundred pairs.
    Columns are multiplied in int64, so they must lie below 2^31.
    """
    draws = []
    for row in rows:
        multiplier, offset = row_key(seed, row)
        x = (columns.long() * multiplier + offset) & _MASK32
        x = ((x ^ x >> 16) * 0x7FEB352D) & _MASK32
        x = ((x ^ x >> 15) * 0x846CA68B) & _MASK32
        x = x ^ x >> 16
        draws.append(((x >> 8).float() + 0.5) * 2.0**-24)
    if not draws:
        return torch.empty(0, len(columns), dtype=torch.float32, device=columns.device)
    return torch.stack(draws)


@dataclass(frozen=True)
class SampledGradient:
    """The sampled gradient for unit upstream gradient, and its certificate.

    ``dy`` is the gradient in the raw logits ``y``, so it contains the softcap's slope and the
    temperature. ``variance_i = sum_{v != target} p (eps - p)^+ slope^2``.
    """

    kept: Tensor  # [N, V] bool, the target entry included
    dy: Tensor  # [N, V]
    variance: Tensor  # [N]
    hidden_variance: Tensor  # [N], the same sum with each term times |W_v|^2


def sampled_gradient(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [N], every token labelled
    seed: int,
    *,
    eps: float = 2**-12,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    rows: Sequence[int] | None = None,  # positions in the flattened input; 0..N-1 if None
) -> SampledGradient:
    """Poisson sampling of the columns of ``p - onehot(target)`` with a Horvitz-Thompson estimate.

    The target entry is kept exactly. Every other entry is kept if ``u * eps < p``, that is with
    probability ``pi = min(1, p / eps)``. A kept entry has the value ``p / pi = max(p, eps)``. ``u``
    has 24 bits, so the probability is a multiple of 2^-24, and the expectation of an entry differs
    from ``p`` by at most ``eps * 2^-24`` (the values of ``u`` above a half are ``2^-23`` apart).
    """
    z = logits(hidden, weight, bias, softcap, temperature)
    p = torch.softmax(z, dim=-1)
    slope = torch.full_like(z, 1 / temperature)
    if softcap is not None:
        slope = (1 - (z * temperature / softcap) ** 2) / temperature
    count, vocabulary = z.shape
    positions = range(count) if rows is None else rows
    columns = torch.arange(vocabulary, dtype=torch.int64, device=z.device)
    u = uniforms(seed, positions, columns).to(z)
    onehot = torch.zeros_like(z, dtype=torch.bool).scatter_(1, target[:, None], True)
    kept = (u * eps < p) | onehot
    dz = torch.where(kept, p.clamp_min(eps), 0.0)
    dz = torch.where(onehot, torch.expm1(torch.log_softmax(z, dim=-1)), dz)
    term = torch.where(onehot, 0.0, p * (eps - p).clamp_min(0)) * slope**2
    norm = weight.to(z).square().sum(dim=-1)
    return SampledGradient(kept, dz * slope, term.sum(dim=-1), term @ norm)
