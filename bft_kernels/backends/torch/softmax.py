"""Softmax of a tile of complete rows of logits, with statistics and the gradient's factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bft_kernels.backends.common.gemm import transform_logits
from bft_kernels.settings import Settings


@dataclass
class Scratch:
    """The buffers of a tile, ``[rows, V]`` each, for all tiles of a call.

    If they were allocated for every tile, they would leave holes between the small results that
    outlive it. On a CPU the process would then grow by most of ``N x V``, although no more than a
    tile is alive.
    """

    exponential: Tensor
    slope: Tensor | None
    draws: Tensor | None  # [2, rows, V] int32

    @staticmethod
    def make(y: Tensor, rows: int, *, slope: bool = False, sample: bool = False) -> Scratch:
        """For tiles of up to ``rows`` rows of the logit buffer ``y [n, V]``."""
        shape = rows, y.shape[1]
        return Scratch(
            y.new_empty(shape),
            y.new_empty(shape) if slope else None,
            y.new_empty((2, *shape), dtype=torch.int32) if sample else None,
        )


@dataclass
class Softmax:
    """A tile of ``n`` rows after :func:`softmax_tile`; two of its tensors are ``[n, V]``."""

    target: Tensor  # [n]
    maximum: Tensor  # [n]
    argmax: Tensor  # [n]
    shifted: Tensor  # [n, V], z - maximum, in the caller's logit buffer
    exponential: Tensor  # [n, V], exp(shifted)
    total: Tensor  # [n], sum of exponential
    log_total: Tensor  # [n]
    slope: Tensor | None  # [n, V], dz/dy without the temperature; None without a softcap
    normalized: bool = False

    @property
    def probability(self) -> Tensor:
        """``[n, V]``. The first call overwrites ``exponential`` with it."""
        if not self.normalized:
            self.exponential.div_(self.total[:, None])
            self.normalized = True
        return self.exponential

    @property
    def nll(self) -> Tensor:
        # The target's logit comes from the same tile as the sum, so only rounding of the logarithm
        # can bring this below 0.
        shifted = self.shifted.gather(1, self.target[:, None]).squeeze(1)
        return (self.log_total - shifted).clamp_min_(0)

    @property
    def lse(self) -> Tensor:
        return self.maximum + self.log_total

    @property
    def lse_low(self) -> Tensor:
        """The part of :attr:`lse` that rounding cut off, by Knuth's exact sum.

        Without it, a recomputed ``exp(z - lse)`` is off by one common factor in the whole row, up
        to half a unit in the last place of ``lse``. If all logits are large, or the rows of
        ``weight`` have a large mean, that is the largest error of the gradient.
        """
        lse = self.lse
        log_total = lse - self.maximum
        return (self.maximum - (lse - log_total)) + (self.log_total - log_total)

    @property
    def entropy(self) -> Tensor:
        # It is taken relative to the maximum, so that large common offsets of the logits cancel
        # exactly. 0 * -inf is not 0, so logits of -inf are clamped; nothing reads them after this.
        self.shifted.clamp_(min=torch.finfo(self.shifted.dtype).min)
        mean = torch.bmm(self.exponential[:, None], self.shifted[:, :, None]).flatten() / self.total
        return (self.log_total - mean).clamp_min_(0)

    @property
    def smooth(self) -> Tensor:
        """``lse - mean_v z_v``, the loss of a uniform label."""
        return self.log_total - self.shifted.mean(dim=1)


def softmax_tile(
    y: Tensor, target: Tensor, bias: Tensor | None, settings: Settings, scratch: Scratch
) -> Softmax:
    """The softmax of raw logits ``y [n, V]``. It overwrites them."""
    count = y.shape[0]
    slope = None if scratch.slope is None else scratch.slope[:count]
    transform_logits(y, bias, settings, slope)
    maximum, argmax = y.max(dim=1)
    y -= maximum[:, None]
    exponential = torch.exp(y, out=scratch.exponential[:count])
    total = exponential.sum(dim=1)
    return Softmax(target, maximum, argmax, y, exponential, total, total.log(), slope)


def token_loss(tile: Softmax, nll: Tensor, settings: Settings) -> Tensor:
    """``(1 - a) nll + a smooth + z_loss lse^2``, ``[n]``."""
    loss = nll
    if settings.label_smoothing:
        loss = (1 - settings.label_smoothing) * nll + settings.label_smoothing * tile.smooth
    if settings.z_loss:
        loss = loss + settings.z_loss * tile.lse.square()
    return loss


def write_unit_gradient(tile: Softmax, nll: Tensor, settings: Settings) -> None:
    """Overwrites ``tile.shifted`` with ``dy``, the token loss's gradient in the raw logits."""
    probability, at_target, uniform = gradient_factors(
        tile.lse, nll, tile.shifted.shape[1], settings
    )
    dy = torch.mul(tile.exponential, (probability / tile.total)[:, None], out=tile.shifted)
    if uniform:
        dy -= uniform
    dy.scatter_(1, tile.target[:, None], at_target[:, None])
    if tile.slope is not None:
        dy *= tile.slope
    if settings.temperature != 1.0:
        dy /= settings.temperature


def gradient_factors(
    lse: Tensor, nll: Tensor, vocabulary: int, settings: Settings
) -> tuple[Tensor, Tensor, float]:
    """``dz_v = probability * p_v - uniform`` away from the target, and ``dz_target`` itself.

    ``p_target - 1`` is formed as ``expm1(-nll)``: for confident tokens the subtraction would lose
    most of its digits.
    """
    probability = torch.ones_like(lse)
    if settings.z_loss:
        probability = 1 + 2 * settings.z_loss * lse
    confidence = torch.exp(-nll)
    uniform = settings.label_smoothing / vocabulary
    at_target = (1 - settings.label_smoothing) * torch.expm1(-nll)
    at_target = at_target + (probability - 1 + settings.label_smoothing) * confidence - uniform
    return probability, at_target, uniform
