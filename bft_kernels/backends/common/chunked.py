"""The chunked engine: GEMMs fill a buffer of logits, and a backend's kernels pass over its rows.

If a token's gradient is wanted right after its loss, its logits can stay in the buffer. The exact
weighted loss then takes three products instead of four, and ``dH`` for a frozen head two instead of
three. Chunks of rows fit the byte budget.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bft_kernels.backends.common.gemm import Gemm, converts, gemm_dtype, scale_for
from bft_kernels.backends.common.rows import DeviceRows, LabelledRows
from bft_kernels.backends.common.top_k import SHARE, TopLogits
from bft_kernels.backends.common.weighted import WeightedSums, WeightingFunction, pieces
from bft_kernels.problem import Problem, storage
from bft_kernels.results import Documents, Forward, WeightedLoss


class RowKernels(Protocol):
    """What a backend supplies: passes over the rows of a buffer of raw logits ``[n, V]``.

    Rows are numbered as ``rows`` lists them; ``first`` is the number of the buffer's first row.
    """

    @property
    def rows(self) -> LabelledRows | DeviceRows: ...

    @property
    def plan(self) -> RowPlan: ...

    @property
    def results(self) -> dict[str, Tensor]:
        """The results of rows, by the names of ``row_results``."""

    def forward(self, logits: Tensor, first: int, *, gradient: bool, collect: bool = True) -> None:
        """Takes the online softmax; fills in results and, if wanted, sample and certificate.

        ``gradient`` says that :meth:`gradient` follows. ``collect=False`` says that the results are
        filled in already.
        """

    def gradient(self, logits: Tensor, first: int, coefficient: Tensor | None) -> Tensor:
        """``coefficient [n] * dy``, ``[n, V]`` in the memory of ``logits``, after their forward.

        ``None`` stands for unit upstream gradient. The type is that of GEMMs, or of the logits.
        """

    def packed(self, unit: Tensor | None) -> Forward:
        """The results over all ``N`` rows."""

    @property
    def weigh(self) -> WeightingFunction:
        """Token and sequence weights; see :func:`bft_kernels.weighting.balance`."""


def linear_nll(make: Callable[[Problem], RowKernels], problem: Problem) -> Forward:
    """Losses and statistics of every labelled row, and what ``problem.saved`` says is kept."""
    kernels = make(problem)
    rows, plan, hidden = kernels.rows, kernels.plan, problem.hidden
    gemm = Gemm(
        problem.weight, problem.operand, problem.acc_dtype, plan.weight_rows, problem.adapter
    )
    chunk = min(plan.chunk_rows, rows.size)
    buffer = hidden.new_empty(chunk, problem.shape[1], dtype=problem.acc_dtype)
    unit = None
    if problem.saved == "unit":
        unit = hidden.new_empty(rows.size, hidden.shape[1], dtype=storage(hidden.dtype))
    top = TopLogits(problem, rows) if problem.settings.top_k else None
    for first in range(0, rows.size, max(1, chunk)):
        stop = min(first + chunk, rows.size)
        operand = gemm.rows(rows.take(hidden, first, stop))
        logits = gemm.logits(operand, buffer[: stop - first])
        if top is not None:
            top.take(logits, first)
        kernels.forward(logits, first, gradient=unit is not None)
        if unit is not None:
            scale = _scale(problem, None, kernels.results["lse"][first:stop])
            upstream = None if scale is None else scale.expand(stop - first)
            product = gemm.hidden_gradient(kernels.gradient(logits, first, upstream))
            unit[first:stop] = product if scale is None else product.div_(scale)
    result = kernels.packed(unit)
    return result if top is None else top.added_to(result)


def weighted_loss(
    make: Callable[[Problem], RowKernels],
    problem: Problem,
    token_scale: Tensor,  # [N], the factor of each token's weight; see `token_scales`
    documents: Documents | None,  # None for weights local to a token
) -> WeightedLoss:
    """The loss and its gradients for unit upstream gradient, made in the pass of the logits (3G).

    Documents whose rows fit one chunk get their weights while their logits are still in the buffer.
    A longer document takes two passes: losses first, then gradients from new logits (4G).
    """
    kernels = make(problem)
    rows, plan, hidden = kernels.rows, kernels.plan, problem.hidden
    assert isinstance(rows, LabelledRows)
    acc = problem.acc_dtype
    gemm = Gemm(problem.weight, problem.operand, acc, plan.weight_rows, problem.adapter)
    sums = WeightedSums(problem, rows, documents, kernels.results, kernels.weigh)
    token_scale = rows.take(token_scale.to(acc), 0, rows.size)
    together = list(pieces(rows, sums.documents, plan.chunk_rows))
    longest = max([piece.stop - piece.first for piece in together], default=0)
    size = min(longest, plan.chunk_rows), problem.shape[1]
    buffer = hidden.new_empty(size, dtype=acc)
    for piece in together:
        parts = [
            (a, min(a + plan.chunk_rows, piece.stop))
            for a in range(piece.first, piece.stop, plan.chunk_rows)
        ]
        fits = len(parts) == 1
        for a, b in parts:
            operand = gemm.rows(rows.take(hidden, a, b))
            logits = gemm.logits(operand, buffer[: b - a])
            kernels.forward(logits, a, gradient=fits)
        coefficient = token_scale[piece.first : piece.stop] * sums.token_weights_of(piece)
        sums.add_losses(piece, coefficient)
        for a, b in parts:
            if not fits:
                operand = gemm.rows(rows.take(hidden, a, b))
                logits = gemm.logits(operand, buffer[: b - a])
                kernels.forward(logits, a, gradient=True, collect=False)
            upstream = coefficient[a - piece.first : b - piece.first]
            scale = _scale(problem, upstream, sums.results["lse"][a:b])
            upstream = upstream if scale is None else upstream * scale
            dy = kernels.gradient(logits, a, upstream)
            sums.add_gradients(a, b, dy, operand, gemm, scale)
    return sums.result()


def _scale(problem: Problem, upstream: Tensor | None, lse: Tensor) -> Tensor | None:
    """The factor of a float16 ``dy``; ``None`` for other types. ``upstream=None`` means 1."""
    operand = gemm_dtype(problem.operand, problem.acc_dtype, problem.hidden.device.type)
    if operand != torch.float16:
        return None
    settings = problem.settings
    upstream = torch.ones_like(lse) if upstream is None else upstream
    return scale_for(upstream, lse, settings.temperature, settings.z_loss)


# --- the memory plan -----------------------------------------------------------------------------

# A GPU's GEMM computes whole tiles of PRODUCT_ROWS rows. So large chunks are a multiple of it.
PRODUCT_ROWS, MANY_ROWS = 128, 512


@dataclass(frozen=True)
class RowPlan:
    """Blocks of whole rows of logits, ``[chunk_rows, V]``."""

    chunk_rows: int
    weight_rows: int  # rows of ``weight`` that are widened at a time; V if nothing is widened
    reserved: int  # bytes that the kernels take beside the logits


def chunk_plan(
    problem: Problem,
    rows: int,
    budget: int | None = None,
    reserve: Callable[[int], int] = lambda _: 0,
) -> RowPlan:
    """The plan of a call; see :func:`plan_rows`."""
    (_, vocabulary, width), acc = problem.shape, problem.acc_dtype
    widen = converts(problem.weight, problem.operand, acc)
    budget = budget or problem.buffer_bytes
    if problem.settings.top_k:
        budget -= budget // SHARE
    sizes = rows, vocabulary, width, acc.itemsize, budget
    return plan_rows(*sizes, widen=widen, reserve=reserve)


def plan_rows(
    rows: int,
    vocabulary: int,
    width: int,
    itemsize: int,
    budget: int,
    *,
    widen: bool,
    reserve: Callable[[int], int] = lambda _: 0,
) -> RowPlan:
    """Block sizes for passes that need whole rows.

    Args:
        rows, vocabulary, width: ``N``, ``V`` and ``D``.
        itemsize: bytes of an accumulator element.
        budget: bytes for everything together. At least one row is taken, however small it is.
        widen: whether blocks of ``weight`` are copied to another type first, which takes a
            quarter of the budget.
        reserve: the bytes that the kernels take of those that are left.
    """
    weight_rows = vocabulary
    if widen:
        weight_rows = max(1, min(vocabulary, budget // 4 // (width * itemsize)))
        budget -= budget // 4
    reserved = reserve(budget)
    chunk_rows = (budget - reserved) // (vocabulary * itemsize)
    if chunk_rows >= MANY_ROWS:
        chunk_rows -= chunk_rows % PRODUCT_ROWS
    return RowPlan(max(1, min(rows, chunk_rows)), weight_rows, reserved)


# If this many rows are multiplied at a time, the vendor's GEMM and a pass over its result are
# faster than a product whose tiles never leave registers; see docs/dev/gpu-model.md.
CHUNK_ROWS = 256


def takes_chunks(rows: int, vocabulary: int, budget: int) -> bool:
    """Whether kernels on a device should get their logits in a buffer, chunk by chunk.

    A logit takes 4 bytes, and one more bit with the sampled gradient.
    """
    return min(rows, CHUNK_ROWS) * vocabulary * 33 // 8 <= budget
