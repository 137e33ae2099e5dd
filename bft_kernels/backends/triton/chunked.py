"""The chunked engine: the vendor's product into a buffer, and kernels that go over its rows.

Where a token's gradient is wanted right after its loss, its logits may stay: the exact weighted
loss then takes three products instead of four, and ``dH`` for a frozen head two instead of three.
Chunks of rows fit the byte budget. A chunk's logits are read once for everything the forward gives,
and a second time when the weights are known; ``dy`` then takes their place, in the products' type.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from bft_kernels.backends.gpu.floor import POPULAR, popular_columns
from bft_kernels.backends.gpu.inputs import ROW_RESULTS
from bft_kernels.backends.torch.forward import products_and_plan
from bft_kernels.backends.torch.matmul import gemm_dtype
from bft_kernels.backends.torch.rows import LabelledRows
from bft_kernels.backends.torch.weighted import WeightedEngine, run_pieces
from bft_kernels.backends.triton.configs import triton_dtype
from bft_kernels.backends.triton.device import exact_factors, slope_of, transform
from bft_kernels.backends.triton.entries import list_kept
from bft_kernels.backends.triton.inputs import Inputs
from bft_kernels.backends.triton.sweep import certify_rows, row_arguments, sweep_rows
from bft_kernels.backends.triton.weights import joint_weights
from bft_kernels.config import CoreConfig, Weighting
from bft_kernels.results import Documents, Wanted, WeightedLoss


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
        if "lse" not in self.collected.vectors:
            self._make_results()
        assert self.buffer is not None
        results = {"nll": self.nll, "loss": self.token_loss}
        for name in ("lse", "lse_low", "entropy", "correct"):
            results[name] = self.collected.vectors[name]
        arguments = row_arguments(self.buffer, self.bias, self.targets, self.config)
        sweep_rows(arguments, stop - first, first, results, self.config)

    @functools.cached_property
    def targets(self) -> Tensor:
        """``[n]``, of all rows."""
        return self.rows.take(self.target, 0, self.rows.count).contiguous()

    def _make_results(self) -> None:
        rows = self.rows.count
        statistics = rows if self.config.statistics else 0
        self.collected.vectors.update(
            lse=self.nll.new_empty(rows),
            lse_low=self.nll.new_empty(rows),
            entropy=self.nll.new_empty(statistics),
            correct=self.nll.new_empty(statistics, dtype=torch.bool),
        )

    def joint_weights(
        self, nll: Tensor, labelled: Tensor, cu_seqlens: Tensor, weighting: Weighting
    ) -> Tensor:
        """Token weight times sequence weight of the rows of one piece."""
        return joint_weights(nll, labelled, cu_seqlens, weighting)

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
            label_smoothing=self.config.label_smoothing,
            z_loss=self.config.z_loss,
            **row_arguments(self.buffer, self.bias, self.targets[first:stop], self.config),
        )
        return dy


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
    documents: Documents | None,  # None for weights local to a token
    bias: Tensor | None,  # [V]
    config: CoreConfig,
    weighting: Weighting,
    wanted: Wanted,
) -> WeightedLoss:
    """The loss and its gradients for unit upstream gradient."""
    engine, chunk = _engine(hidden, weight, target, bias, config, wanted)
    run_pieces(engine, share, documents, weighting, chunk)
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


def run_chunks(
    inputs: Inputs, seed: Tensor | None, norms: Tensor | None, results: dict[str, Tensor]
) -> None:
    """The whole forward, a chunk of rows at a time; labelled rows come first.

    The last chunks are computed even where their rows are ignored: how many do not count is known
    on the device only.

    Args:
        inputs: of the call.
        seed: ``[]``, for the sampled gradient.
        norms: ``[V]``, for ``hidden_variance``.
        results: ``[N]`` zeros by the names of ``Forward``, or ``[0]``; for the sampled gradient
            ``counts``, ``columns`` and ``values``.
    """
    config, (count, vocabulary, _) = inputs.config, inputs.shape
    order, labelled = inputs.rows.order, inputs.rows.count
    sampled = config.residual == "entries"
    if sampled:  # a bit for each logit
        config = replace(config, max_buffer_bytes=config.max_buffer_bytes * 32 // 33)
    products, chunk, _ = products_and_plan(inputs.hidden, inputs.weight, count, config, 0)
    device = inputs.hidden.device
    buffer = torch.empty(chunk, vocabulary, dtype=torch.float32, device=device)
    per_row = {name: results[name] for name in ROW_RESULTS}
    popular = mask = None
    if sampled:
        popular = popular_columns(inputs, min(POPULAR, triton.next_power_of_2(count)))
        words = triton.cdiv(vocabulary, 32)
        mask = torch.empty(chunk, words, dtype=torch.int32, device=device)
    for first in range(0, count, chunk):
        rows = min(chunk, count - first)
        logits = buffer[:rows]
        products.logits(products.rows(inputs.hidden[order[first : first + rows]]), logits)
        arguments = row_arguments(logits, inputs.bias, inputs.target, config)
        part = None if mask is None else mask[:rows]
        sweep_rows(
            arguments,
            rows,
            first,
            per_row,
            config,
            order=order,
            count=labelled,
            seed=seed,
            popular=popular,
            mask=part,
        )
        if part is not None:
            assert seed is not None
            list_kept(
                inputs,
                logits,
                part,
                first,
                seed,
                results["lse"],
                results["nll"],
                results["counts"],
                results["columns"],
                results["values"],
            )
        if config.variance or config.hidden_variance:
            certify_rows(
                arguments,
                rows,
                first,
                order,
                labelled,
                results["lse"],
                norms,
                results["variance"],
                results["hidden_variance"],
                config.eps,
            )
