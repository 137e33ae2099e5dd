"""The chunked engine's passes over rows of logits, by kernels on a device."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bft_kernels.backends.common.chunked import chunk_plan
from bft_kernels.backends.common.csr import capacity_for
from bft_kernels.backends.common.gemm import gemm_dtype, squared_norms
from bft_kernels.backends.common.lse_bound import POPULAR, popular_columns
from bft_kernels.backends.common.rows import DeviceRows, LabelledRows, packed, row_results
from bft_kernels.backends.common.weighted import WeightingFunction
from bft_kernels.problem import Problem
from bft_kernels.results import Forward
from bft_kernels.settings import Settings
from bft_kernels.weighting import Weighting


@dataclass(frozen=True)
class LogitRows:
    """Raw products in a buffer, and the rows to which they belong.

    With ``order`` the rows are those of ``order`` from ``first_row`` on, and only the first
    ``count`` of ``order`` are labelled. Without it they are ``target``'s from ``first_row`` on.
    """

    logits: Tensor  # [n, V] float32, contiguous rows
    target: Tensor  # [N] int64, by position
    bias: Tensor | None  # [V], of the kernels' type ROW_BIAS
    settings: Settings
    first_row: int = 0  # the place of the buffer's first row among all
    order: Tensor | None = None  # [N] int64, positions of the rows
    count: Tensor | None = None  # [1] int64, how many of order are labelled


class RowFunctions(Protocol):
    """Passes over rows of logits. A backend supplies them as functions of a module."""

    ROW_BIAS: torch.dtype | None  # the only type of a bias that they take; None for any

    def softmax_rows(
        self,
        rows: LogitRows,
        results: dict[str, Tensor],
        *,
        seed: Tensor | None = None,
        popular: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """Online softmax: losses and statistics, and a bit for each entry that may be kept.

        Args:
            rows: the rows of the buffer.
            results: vectors by the names of ``ROW_RESULTS``: ``[N]``, or ``[0]`` if not wanted.
            seed: ``[]`` int64, for ``mask``.
            popular: ``[K]`` int64, for ``mask``: ascending columns that bound lse from below; K is
                a power of two.
            mask: ``[n, ceil(V / 32)]`` int32.
        """

    def certificate_rows(
        self, rows: LogitRows, norms: Tensor | None, results: dict[str, Tensor]
    ) -> None:
        """Fills in ``variance`` from ``lse``, and ``hidden_variance`` too if ``norms`` is given.

        ``norms [V]`` are the squared norms of the rows of ``weight``.
        """

    def list_rows(
        self, rows: LogitRows, mask: Tensor, seed: Tensor, results: dict[str, Tensor]
    ) -> None:
        """Appends to the lists the entries whose bit is set and that the final lse keeps.

        The lists are ``columns`` and ``values``. Rows that end past their room list nothing, but
        ``counts`` and ``offsets`` include them.
        """

    def gradient_rows(
        self,
        rows: LogitRows,
        dy: Tensor,  # [n, V], in the memory of the logits; a row begins where its logits do
        lse: Tensor,  # [n]
        lse_low: Tensor,  # [n]
        nll: Tensor,  # [n]
        coefficient: Tensor,  # [n] float32
    ) -> None:
        """Writes ``coefficient * dy`` in the place of the logits, in the type of ``dy``.

        The rows are taken as they come, from the first one on.
        """

    def spmm_takes(self, width: int) -> bool:
        """Whether the backward takes lists of entries for rows of this width."""

    def weigh(
        self, nll: Tensor, labelled: Tensor | None, cu_seqlens: Tensor, settings: Settings, /
    ) -> Weighting:
        """See :func:`bft_kernels.weighting.balance`."""


class GradientRows:
    """Rows whose logits become gradients. They are the rows of the input, in their order.

    See :class:`bft_kernels.backends.common.chunked.RowKernels`.
    """

    def __init__(self, kernels: RowFunctions, problem: Problem) -> None:
        self.kernels, self.problem = kernels, problem
        self.weigh: WeightingFunction = kernels.weigh
        self.rows = LabelledRows(problem.target, problem.settings.ignore_index)
        self.plan = chunk_plan(problem, self.rows.size)
        self.bias = row_bias(kernels, problem)
        self.targets = self.rows.take(problem.target, 0, self.rows.size).contiguous()
        self.results = row_results(problem, self.rows.size)

    def forward(self, logits: Tensor, first: int, *, gradient: bool, collect: bool = True) -> None:
        """Losses and statistics of the rows. Their logits stay in the buffer."""
        if collect:
            rows = LogitRows(logits, self.targets, self.bias, self.problem.settings, first)
            self.kernels.softmax_rows(rows, self.results)

    def gradient(self, logits: Tensor, first: int, coefficient: Tensor | None) -> Tensor:
        """``coefficient * dy`` of the rows, in their place and in the GEMMs' type."""
        count, vocabulary = logits.shape
        part = slice(first, first + count)
        dtype = gemm_dtype(self.problem.operand, logits.dtype, logits.device.type)
        dy = logits.view(dtype)[:, :vocabulary]
        lse, low, nll = (self.results[name][part] for name in ("lse", "lse_low", "nll"))
        coefficient = torch.ones_like(lse) if coefficient is None else coefficient.contiguous()
        rows = LogitRows(logits, self.targets[part], self.bias, self.problem.settings)
        self.kernels.gradient_rows(rows, dy, lse, low, nll, coefficient)
        return dy

    def packed(self, unit: Tensor | None) -> Forward:
        """The results over all ``N`` rows, without a sample."""
        return packed(self.problem, self.results, unit, rows=self.rows)


class ForwardRows:
    """Rows of a forward, labelled ones first.

    The last chunks are computed even if all their rows are ignored, since only the device knows how
    many rows are ignored.

    See :class:`bft_kernels.backends.common.chunked.RowKernels`.
    """

    def __init__(self, kernels: RowFunctions, problem: Problem) -> None:
        self.kernels, self.problem = kernels, problem
        self.weigh: WeightingFunction = kernels.weigh
        self.rows = DeviceRows.of(problem.target, problem.settings.ignore_index)
        self.target, self.bias = problem.target.contiguous(), row_bias(kernels, problem)
        count, vocabulary, _ = problem.shape
        sampled = problem.saved == "entries"
        # The mask takes a bit for each logit.
        budget = problem.buffer_bytes * 32 // 33 if sampled else None
        self.plan = chunk_plan(problem, count, budget)
        self.results = forward_results(kernels, problem, with_values=True)
        self.popular = self.mask = self.norms = None
        if sampled:
            few = min(POPULAR, 1 << (count - 1).bit_length()) if count else 0
            self.popular = popular_columns(self.target, self.rows, vocabulary, few)
            size = min(self.plan.chunk_rows, count), -(-vocabulary // 32)
            self.mask = problem.target.new_empty(size, dtype=torch.int32)
        if problem.hidden_variance:
            self.norms = squared_norms(problem.weight, torch.float32, problem.buffer_bytes)

    def forward(self, logits: Tensor, first: int, *, gradient: bool, collect: bool = True) -> None:
        """Losses, statistics, sample and certificate of the rows, by position."""
        problem, results, kernels = self.problem, self.results, self.kernels
        listed = self.rows.order, self.rows.count
        rows = LogitRows(logits, self.target, self.bias, problem.settings, first, *listed)
        mask = None if self.mask is None else self.mask[: logits.shape[0]]
        kernels.softmax_rows(rows, results, seed=problem.seed, popular=self.popular, mask=mask)
        if mask is not None:
            assert problem.seed is not None
            kernels.list_rows(rows, mask, problem.seed, results)
        if problem.variance:
            kernels.certificate_rows(rows, self.norms, results)

    def gradient(self, logits: Tensor, first: int, coefficient: Tensor | None) -> Tensor:
        """These rows have no gradient."""
        raise NotImplementedError

    def packed(self, unit: Tensor | None) -> Forward:
        """The results, which already lie in their places."""
        return packed(self.problem, self.results, unit, lists_of(self.results))


def row_bias(kernels: RowFunctions, problem: Problem) -> Tensor | None:
    """The bias as the kernels take it."""
    if problem.bias is None:
        return None
    return problem.bias.to(kernels.ROW_BIAS or problem.bias.dtype).contiguous()


def forward_results(
    kernels: RowFunctions, problem: Problem, *, with_values: bool
) -> dict[str, Tensor]:
    """The tensors for a forward's results, by position; ignored rows have zeros.

    They are those of ``row_results`` and the lists: ``counts [N]``, ``offsets [N + 1]``, and room
    for the ``columns`` and ``values`` of the expected entries, or none if the backward takes no
    lists. Rows without room are computed again.
    """
    count, vocabulary, width = problem.shape
    sampled, room = problem.saved == "entries", 0
    if sampled and kernels.spmm_takes(width):
        room = capacity_for(count, vocabulary, problem.settings.eps)
    new, zeros = problem.hidden.new_empty, problem.hidden.new_zeros
    return row_results(problem, count, filled=True) | {
        "counts": zeros(count * sampled, dtype=torch.int64),
        "offsets": zeros((count + 1) * sampled, dtype=torch.int64),
        "columns": new(room, dtype=torch.int32),
        "values": new(room * with_values, dtype=torch.float32),
    }


def lists_of(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """The lists for which :func:`forward_results` made room, by the names of `Forward`."""
    return {f"csr_{name}": results[name] for name in ("offsets", "columns", "values")}
