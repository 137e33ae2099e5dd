"""The chunked engine's passes over rows of logits, in Triton."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from bft_kernels.backends.common.chunked import chunk_plan
from bft_kernels.backends.common.csr import capacity_for, offsets_of
from bft_kernels.backends.common.gemm import gemm_dtype, squared_norms
from bft_kernels.backends.common.lse_bound import POPULAR, popular_columns
from bft_kernels.backends.common.rows import ROW_RESULTS, LabelledRows, row_results
from bft_kernels.backends.triton.entries import list_kept
from bft_kernels.backends.triton.inputs import Inputs
from bft_kernels.backends.triton.sweep import (
    certify_rows,
    gradient_rows,
    row_arguments,
    sweep_rows,
)
from bft_kernels.backends.triton.weights import weigh
from bft_kernels.problem import Problem
from bft_kernels.results import Forward


class GradientRows:
    """Rows whose logits become gradients: those of the input, in their order.

    See :class:`bft_kernels.backends.common.chunked.RowKernels`.
    """

    weigh = staticmethod(weigh)

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.rows = LabelledRows(problem.target, problem.settings.ignore_index)
        self.plan = chunk_plan(problem, self.rows.size, 0)
        self.bias = None if problem.bias is None else problem.bias.contiguous()
        self.targets = self.rows.take(problem.target, 0, self.rows.size).contiguous()
        self.results = row_results(problem, self.rows.size)

    def forward(self, logits: Tensor, first: int, *, gradient: bool, collect: bool = True) -> None:
        """Losses and statistics of the rows, whose logits stay in the buffer."""
        if collect:
            per_row = {name: self.results[name] for name in ROW_RESULTS}
            arguments = row_arguments(logits, self.bias, self.targets, self.problem.settings)
            sweep_rows(arguments, logits.shape[0], first, per_row, self.problem)

    def gradient(self, logits: Tensor, first: int, coefficient: Tensor | None) -> Tensor:
        """``coefficient * dy`` of the rows, in their place and in the GEMMs' type."""
        rows, vocabulary = logits.shape
        part = slice(first, first + rows)
        dtype = gemm_dtype(self.problem.operand, logits.dtype, logits.device.type)
        dy = logits.view(dtype)[:, :vocabulary]
        lse, low, nll = (self.results[name][part] for name in ("lse", "lse_low", "nll"))
        coefficient = torch.ones_like(lse) if coefficient is None else coefficient.contiguous()
        settings = self.problem.settings
        arguments = row_arguments(logits, self.bias, self.targets[part], settings)
        gradient_rows(arguments, dy, lse, low, nll, coefficient, settings)
        return dy

    def packed(self, unit: Tensor) -> Forward:
        """The results over all ``N`` rows, without a sample."""

        def full(name: str, wanted: bool) -> Tensor:
            values = self.results[name]
            return self.rows.spread(values) if wanted else values

        statistics = self.problem.statistics

        def absent(dtype: torch.dtype = torch.float32) -> Tensor:
            return unit.new_empty(0, dtype=dtype)

        return Forward(
            loss=full("loss", True),
            nll=full("nll", True),
            lse=full("lse", True),
            lse_low=absent(),
            entropy=full("entropy", statistics),
            correct=full("correct", statistics),
            variance=absent(),
            hidden_variance=absent(),
            unit=self.rows.spread(unit),
            entry_offsets=absent(torch.int64),
            entry_columns=absent(torch.int32),
            entry_values=absent(),
        )


class ForwardRows:
    """Labelled rows first; the last chunks are computed even where their rows are ignored: how many
    do not count is known on the device only.

    See :class:`bft_kernels.backends.common.chunked.RowKernels`.
    """

    weigh = staticmethod(weigh)

    def __init__(self, problem: Problem) -> None:
        self.problem, self.inputs = problem, Inputs.of(problem)
        self.rows = self.inputs.rows
        count, vocabulary, _ = problem.shape
        self.sampled = problem.saved == "entries"
        # A bit for each logit.
        budget = problem.buffer_bytes * 32 // 33 if self.sampled else None
        self.plan = chunk_plan(problem, count, 0, budget)
        self.results = forward_results(problem, with_values=True)
        self.popular = self.mask = self.norms = None
        if self.sampled:
            few = min(POPULAR, triton.next_power_of_2(count))
            self.popular = popular_columns(self.inputs, few)
            words = triton.cdiv(vocabulary, 32)
            rows = min(self.plan.chunk_rows, count)
            self.mask = problem.target.new_empty((rows, words), dtype=torch.int32)
        if problem.hidden_variance:
            self.norms = squared_norms(self.inputs.weight, torch.float32, problem.buffer_bytes)

    def forward(self, logits: Tensor, first: int, *, gradient: bool, collect: bool = True) -> None:
        """Losses, statistics, sample and certificate of the rows, by position."""
        problem, inputs, results = self.problem, self.inputs, self.results
        rows = logits.shape[0]
        arguments = row_arguments(logits, inputs.bias, inputs.target, problem.settings)
        mask = None if self.mask is None else self.mask[:rows]
        listed = inputs.rows.order, inputs.rows.count
        sweep_rows(
            arguments,
            rows,
            first,
            {name: results[name] for name in ROW_RESULTS},
            problem,
            order=listed[0],
            count=listed[1],
            seed=problem.seed,
            popular=self.popular,
            mask=mask,
        )
        if mask is not None:
            assert problem.seed is not None
            found = [results[name] for name in ("lse", "nll", "counts", "columns", "values")]
            list_kept(inputs, logits, mask, first, problem.seed, *found)
        if problem.variance:
            certify_rows(
                arguments,
                rows,
                first,
                *listed,
                results["lse"],
                self.norms,
                results["variance"],
                results["hidden_variance"],
                problem.settings.eps,
            )

    def gradient(self, logits: Tensor, first: int, coefficient: Tensor | None) -> Tensor:
        """These rows have none."""
        raise NotImplementedError

    def packed(self, unit: Tensor) -> Forward:
        """The results, which lie where they belong."""
        return packed(self.problem, self.results, unit)


def forward_results(problem: Problem, *, with_values: bool) -> dict[str, Tensor]:
    """Where a forward's results go, by position: zeros where rows are ignored.

    Besides those of ``row_results``: ``counts [N]``, and ``columns`` and ``values`` of the entries
    that are listed, in room for what is expected.
    """
    count, vocabulary, _ = problem.shape
    sampled = problem.saved == "entries"
    room = capacity_for(count, vocabulary, problem.settings.eps) if sampled else 0
    new = problem.hidden.new_empty
    return {
        **row_results(problem, count, filled=True),
        "counts": problem.hidden.new_zeros(count if sampled else 0, dtype=torch.int64),
        "columns": new(room, dtype=torch.int32),
        "values": new(room if with_values else 0, dtype=torch.float32),
    }


def packed(problem: Problem, results: dict[str, Tensor], unit: Tensor) -> Forward:
    """What :func:`forward_results` made room for."""
    sampled = problem.saved == "entries"
    return Forward(
        **{name: results[name] for name in Forward._fields if name in results},
        unit=unit,
        entry_offsets=offsets_of(results["counts"]) if sampled else results["counts"],
        entry_columns=results["columns"],
        entry_values=results["values"],
    )
