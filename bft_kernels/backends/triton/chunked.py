"""The chunked engine: the vendor's product into a buffer, and kernels that go over its rows.

Where a token's gradient is wanted right after its loss, its logits may stay: the exact weighted
loss then takes three products instead of four, and ``dH`` for a frozen head two instead of three.
Chunks of rows fit the byte budget. A chunk's logits are read once for everything the forward gives,
and a second time when the weights are known; ``dy`` then takes their place, in the products' type.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bft_kernels.backends.torch.forward import products_and_plan
from bft_kernels.backends.torch.matmul import gemm_dtype
from bft_kernels.backends.torch.rows import LabelledRows
from bft_kernels.backends.torch.weighted import WeightedEngine, run_pieces
from bft_kernels.backends.triton.configs import triton_dtype
from bft_kernels.backends.triton.device import (
    exact_factors,
    finite_or,
    slope_of,
    token_loss,
    transform,
)
from bft_kernels.backends.triton.weights import joint_weights
from bft_kernels.config import CoreConfig, Weighting
from bft_kernels.results import Wanted, WeightedLoss


@triton.jit
def _sweep_rows_kernel(
    logits_ptr,  # [n, V], raw products
    bias_ptr,  # [V]
    target_ptr,  # [n]
    nll_ptr,  # these are [n]
    loss_ptr,
    lse_ptr,
    lse_low_ptr,
    entropy_ptr,
    correct_ptr,
    V,
    inverse_temperature,
    softcap,
    label_smoothing,
    z_loss,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    STATISTICS: tl.constexpr,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
):
    """A program reads the logits of a row once: loss and statistics."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    logits = logits_ptr + row * V
    offs = tl.arange(0, BLOCK)
    m = tl.full((BLOCK,), float("-inf"), tl.float32)
    before = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    moment = tl.zeros((BLOCK,), tl.float32)
    shifted = tl.zeros((BLOCK,), tl.float32)
    # Each lane keeps sums of its own; they are joined once, at the end.
    for start in range(0, V, BLOCK):
        column = start + offs
        mask = column < V
        y = tl.load(logits + column, mask=mask, other=0.0)
        bias = 0.0
        if HAS_BIAS:
            bias = tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
        z = transform(y, bias, inverse_temperature, softcap, HAS_BIAS, HAS_CAP)
        z = tl.where(mask, z, float("-inf"))
        m_new = tl.maximum(m, z)
        reference = finite_or(m_new, 0.0)
        scale, difference = tl.exp(m - reference), z - reference
        e = tl.exp(difference)
        if STATISTICS:
            step = tl.where(total > 0, total * (m - reference), 0.0)
            moment = scale * (moment + step) + e * tl.maximum(difference, -1e30)
            before = tl.where(column < target, tl.maximum(before, z), before)
        if SMOOTHING:
            # A lane has seen start / BLOCK columns so far.
            step = tl.where(start > 0, (m - reference) * (start // BLOCK), 0.0)
            shifted += step + tl.where(mask, difference, 0.0)
        total = scale * total + e
        m = m_new
    peak = tl.max(m, axis=0)
    reference = finite_or(peak, 0.0)
    lanes = finite_or(m, 0.0)
    scale = tl.exp(m - reference)
    if STATISTICS:
        step = tl.where(total > 0, total * (m - reference), 0.0)
        moment_sum = tl.sum(scale * (moment + step), axis=0)
    shifted_sum = 0.0
    if SMOOTHING:
        seen = tl.cdiv(tl.maximum(V - offs, 0), BLOCK)
        shifted_sum = tl.sum(shifted + tl.where(seen > 0, (lanes - reference) * seen, 0.0), axis=0)
    sum_all = tl.sum(scale * total, axis=0)
    column = tl.minimum(tl.maximum(target, 0), V - 1)  # of a target nobody checked
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column).to(tl.float32)
    y = tl.load(logits + column)
    own = transform(y, bias, inverse_temperature, softcap, HAS_BIAS, HAS_CAP)
    own = tl.where(column == target, own, float("nan"))
    log_total = tl.log(sum_all)
    nll, lse, low, loss = token_loss(
        log_total, reference, own, shifted_sum, V, label_smoothing, z_loss, SMOOTHING, Z_LOSS
    )
    tl.store(nll_ptr + row, nll)
    tl.store(lse_ptr + row, lse)
    tl.store(lse_low_ptr + row, low)
    tl.store(loss_ptr + row, loss)
    if STATISTICS:
        entropy = log_total - moment_sum / sum_all
        tl.store(entropy_ptr + row, tl.where(entropy < 0, 0.0, entropy))
        tl.store(correct_ptr + row, (own == peak) & (tl.max(before, axis=0) < own) & (lse == lse))


@triton.jit
def _gradient_rows_kernel(
    logits_ptr,  # [n, V] float32, raw products
    dy_ptr,  # [n, V], in the same memory; a row begins where its logits do
    bias_ptr,  # [V]
    target_ptr,  # [n]
    lse_ptr,  # [n]
    lse_low_ptr,  # [n]
    nll_ptr,  # [n]
    coefficient_ptr,  # [n]
    V,
    stride_dn,
    inverse_temperature,
    softcap,
    label_smoothing,
    z_loss,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """``coefficient * dy`` of a row takes the place of its logits."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    lse = tl.load(lse_ptr + row)
    nll = tl.load(nll_ptr + row)
    coefficient = tl.load(coefficient_ptr + row)
    rest = tl.exp(-tl.load(lse_low_ptr + row))
    share, even, own = exact_factors(lse, nll, V, label_smoothing, z_loss)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < V
        y = tl.load(logits_ptr + row * V + column, mask=mask, other=0.0)
        bias = 0.0
        if HAS_BIAS:
            bias = tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
        z = transform(y, bias, inverse_temperature, softcap, HAS_BIAS, HAS_CAP)
        dz = tl.where(column == target, own, tl.exp(z - lse) * rest * share - even)
        dy = dz * slope_of(z, inverse_temperature, softcap, HAS_CAP) * coefficient
        # Narrow values are written over logits of this block, or of one before it: all threads
        # must have read theirs.
        tl.debug_barrier()
        tl.store(dy_ptr + row * stride_dn + column, dy.to(OPERAND), mask=mask)


class ChunkedEngine(WeightedEngine):
    """Goes over the buffer's rows in one kernel each time."""

    def load(self, first: int, stop: int, *, gradient: bool, collect: bool = True) -> None:
        """Losses of rows ``first:stop``, whose logits stay in the buffer."""
        self._logits(first, stop)
        if not collect:
            return
        rows = stop - first
        empty = self.nll.new_empty
        results = {name: empty(rows) for name in ("nll", "loss", "lse", "lse_low")}
        statistics = rows if self.config.statistics else 0
        results["entropy"] = empty(statistics)
        results["correct"] = empty(statistics, dtype=torch.bool)
        _sweep_rows_kernel[(rows,)](
            STATISTICS=self.config.statistics,
            SMOOTHING=self.config.label_smoothing > 0,
            Z_LOSS=self.config.z_loss != 0,
            **{f"{name}_ptr": values for name, values in results.items()},
            **self._arguments(first, stop),
        )
        self.nll[first:stop], self.token_loss[first:stop] = results["nll"], results["loss"]
        self.collected.add(first, lse=results["lse"], lse_low=results["lse_low"])
        if self.config.statistics:
            self.collected.add(first, entropy=results["entropy"], correct=results["correct"])

    def weights(self, bounds: list[int], weighting: Weighting) -> Tensor:
        """Token weight times sequence weight of the rows of one piece."""
        first, stop = bounds[0], bounds[-1]
        labelled = self.rows.take(self.rows.labelled, first, stop)
        cu_seqlens = torch.tensor(bounds) - first
        return joint_weights(self.nll[first:stop], labelled, cu_seqlens, weighting)

    def _weighted_dy(self, first: int, stop: int, coefficient: Tensor) -> Tensor:
        """``coefficient * dy`` of the buffer's rows, in their place and in the products' type."""
        assert self.buffer is not None
        vocabulary = self.weight.shape[0]
        dtype = gemm_dtype(self.products.operand, self.wide, self.weight.device.type)
        dy = self.buffer[: stop - first].view(dtype)[:, :vocabulary]
        _gradient_rows_kernel[(stop - first,)](
            dy_ptr=dy,
            lse_ptr=self.collected.vectors["lse"][first:stop],
            lse_low_ptr=self.collected.vectors["lse_low"][first:stop],
            nll_ptr=self.nll[first:stop],
            coefficient_ptr=coefficient.contiguous(),
            stride_dn=dy.stride(0),
            OPERAND=triton_dtype(dtype),
            **self._arguments(first, stop),
        )
        return dy

    def _arguments(self, first: int, stop: int) -> dict[str, object]:
        """What both kernels take."""
        config, vocabulary = self.config, self.weight.shape[0]
        return {
            "logits_ptr": self.buffer,
            "bias_ptr": self.bias,
            "target_ptr": self.rows.take(self.target, first, stop).contiguous(),
            "V": vocabulary,
            "inverse_temperature": 1.0 / config.temperature,
            "softcap": config.softcap or 1.0,
            "label_smoothing": config.label_smoothing,
            "z_loss": config.z_loss,
            "BLOCK": min(4096, triton.next_power_of_2(vocabulary)),
            "HAS_BIAS": self.bias is not None,
            "HAS_CAP": config.softcap is not None,
            "num_warps": 8,
        }


def _engine(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    config: CoreConfig,
    wanted: Wanted,
) -> tuple[ChunkedEngine, int]:
    """The engine, and how many rows of logits its buffer takes."""
    rows = LabelledRows(target, config.ignore_index)
    products, chunk, _ = products_and_plan(hidden, weight, rows.count, config, 0)
    bias = None if bias is None else bias.contiguous()
    engine = ChunkedEngine(hidden, weight, target, bias, rows, products, 0, config, wanted)
    return engine, chunk


def weighted_loss(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [N]
    share: Tensor,  # [N], what multiplies each token's weight: 1/(T_b B), token weights over n, ...
    cu_seqlens: Tensor | None,  # [S + 1] on the CPU; None for weights local to a token
    bias: Tensor | None,  # [V]
    config: CoreConfig,
    weighting: Weighting,
    wanted: Wanted,
) -> WeightedLoss:
    """The loss and its gradients for unit upstream gradient."""
    engine, chunk = _engine(hidden, weight, target, bias, config, wanted)
    run_pieces(engine, share, cu_seqlens, weighting, chunk)
    return engine.result()


def linear_nll_unit(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [N]
    bias: Tensor | None,  # [V]
    config: CoreConfig,
) -> tuple[WeightedLoss, Tensor]:
    """Losses and statistics of every row, and the losses themselves, smoothing and all; the
    gradient of ``hidden`` is that of their sum.
    """
    wanted = Wanted(hidden=True, weight=False, bias=False)
    engine, chunk = _engine(hidden, weight, target, bias, config, wanted)
    ones = engine.rows.labelled.float()
    for first in range(0, engine.rows.count, chunk):
        stop = min(first + chunk, engine.rows.count)
        engine.load(first, stop, gradient=True)
        engine.add_gradients(first, stop, engine.rows.take(ones, first, stop))
    return engine.result(), engine.rows.spread(engine.token_loss)
