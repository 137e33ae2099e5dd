"""The backward of the core op, from recomputed logits or from the sampled entries."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bft_kernels.backends.common.gemm import Gemm, add_product, converts, transform_logits
from bft_kernels.backends.common.rows import LabelledRows
from bft_kernels.backends.torch.softmax import gradient_factors
from bft_kernels.problem import Problem
from bft_kernels.results import Gradients, Saved
from bft_kernels.settings import Settings

_LEAST_LOG_P = -1e4  # exp of it is 0 in every type


def linear_nll_backward(
    problem: Problem,
    grad: Tensor,  # [N]; [3, N] with differentiable statistics, see ops.linear_nll_backward
    saved: Saved,
    grad_weight: Tensor | None = None,  # [V, D], added to in place; a new one if None
) -> Gradients:
    """The wanted gradients of ``sum(grad * loss)``, and of statistics."""
    rows = LabelledRows(problem.target, problem.settings.ignore_index)
    grad = torch.where(rows.labelled, grad, 0).to(problem.acc_dtype)
    if not problem.wanted.weight:
        grad_weight = None
    elif grad_weight is None:
        grad_weight = torch.zeros_like(problem.weight, memory_format=torch.contiguous_format)
    if problem.settings.gradient == "sampled":
        return _from_entries(problem, grad, saved, grad_weight)
    return _recompute(problem, grad, saved, rows, grad_weight)


def _recompute(
    problem: Problem, grad: Tensor, saved: Saved, rows: LabelledRows, grad_weight: Tensor | None
) -> Gradients:
    """Gradients from recomputed logits."""
    settings, vocabulary = problem.settings, problem.shape[1]
    grads = grad.unbind() if grad.dim() > 1 else (grad,)

    def write(y: Tensor, part: list[Tensor], at: Place) -> None:
        _logit_gradient(y, part, at.first_column, vocabulary, at.bias, settings)

    return by_columns(
        problem,
        rows,
        (problem.target, saved.lse, saved.lse_low, saved.nll, *grads),
        write,
        grad_weight,
        scratch=2 * (settings.softcap is not None) + (grad.dim() > 1),
    )


class Place(NamedTuple):
    """Where a block of logits lies."""

    first_row: int
    first_column: int
    bias: Tensor | None  # of its columns


def by_columns(
    problem: Problem,
    rows: LabelledRows,
    values: Sequence[Tensor],  # [N] each
    write: Callable[[Tensor, list[Tensor], Place], None],
    grad_weight: Tensor | None = None,  # [V, D], added to
    *,
    scratch: int,
) -> Gradients:
    """The wanted gradients, from recomputed logits, one block of the vocabulary after the other.

    So ``dW`` is written once, block by block. Only ``dH`` is accumulated over blocks, in a float32
    ``N x D``. A row-wise order would need a float32 ``V x D``.

    Args:
        problem: the call, and the gradients that are wanted.
        rows: the rows that are computed.
        values: what ``write`` needs to know of each row.
        write: gets raw logits ``[n, columns]``, which it overwrites with their gradient, the values
            ``[n]`` of their rows, and their place.
        grad_weight: where ``dW`` is added, if it is wanted.
        scratch: how many blocks of logits ``write`` allocates.
    """
    hidden, weight, wanted = problem.hidden, problem.weight, problem.wanted
    acc, (_, vocabulary, width) = problem.acc_dtype, problem.shape
    plan = plan_columns(
        rows.size,
        vocabulary,
        width,
        acc.itemsize,
        problem.buffer_bytes,
        copies=rows.copies or converts(hidden, problem.operand, acc),
        scratch=scratch,
    )
    gemm = Gemm(weight, problem.operand, acc, plan.columns, problem.adapter)
    split = gemm.width  # where the adapter's part of a row of hidden begins
    buffer = hidden.new_empty(max(1, min(plan.rows, rows.size)) * plan.columns, dtype=acc)
    grad_hidden = hidden.new_zeros(rows.size, width, dtype=acc) if wanted.hidden else None
    grad_bias = weight.new_zeros(vocabulary, dtype=acc) if wanted.bias else None
    grad_adapter = None
    if problem.adapter is not None and wanted.adapter:
        grad_adapter = problem.adapter.new_zeros(problem.adapter.shape, dtype=acc)
    bias = None if problem.bias is None else problem.bias.to(acc)
    for first in range(0, vocabulary, plan.columns):
        stop = min(first + plan.columns, vocabulary)
        columns = gemm.columns(first, stop)
        into = None
        if grad_weight is not None:
            into = grad_weight[first:stop]
            into = into if into.dtype == acc else into.new_zeros(into.shape, dtype=acc)
        for a in range(0, rows.size, plan.rows):
            b = min(a + plan.rows, rows.size)
            operand = gemm.rows(rows.take(hidden, a, b))
            dy = buffer[: (b - a) * (stop - first)].view(b - a, stop - first)
            gemm.block_of_logits(operand, columns, first, dy)
            part = [rows.take(x, a, b) for x in values]
            write(dy, part, Place(a, first, None if bias is None else bias[first:stop]))
            narrow = dy.to(columns.dtype)
            if grad_hidden is not None:
                add_product(grad_hidden[a:b, :split], narrow, columns)
                if gemm.adapter is not None:
                    add_product(grad_hidden[a:b, split:], narrow, gemm.adapter[first:stop])
            if into is not None:
                add_product(into, narrow.T, operand[:, :split])
            if grad_adapter is not None:
                add_product(grad_adapter[first:stop], narrow.T, operand[:, split:])
            if grad_bias is not None:
                grad_bias[first:stop].add_(dy.sum(dim=0))
        if grad_weight is not None and into is not None and grad_weight.dtype != acc:
            grad_weight[first:stop].add_(into)
    if grad_hidden is not None:
        grad_hidden = rows.spread(grad_hidden, hidden.dtype)
    if grad_adapter is not None and problem.adapter is not None:
        grad_adapter = grad_adapter.to(problem.adapter.dtype)
    return Gradients(grad_hidden, grad_weight, grad_bias, grad_adapter)


def _logit_gradient(
    y: Tensor,  # [n, columns], raw logits, overwritten by grad * dy
    row_values: list[Tensor],  # target, lse, lse_low, nll, grad and its two others, each [n]
    first: int,
    vocabulary: int,
    bias: Tensor | None,
    settings: Settings,
) -> None:
    target, lse, lse_low, nll, grad, *of_statistics = row_values
    slope = None if settings.softcap is None else torch.empty_like(y)
    transform_logits(y, bias, settings, slope)
    probability, at_target, uniform = gradient_factors(lse, nll, vocabulary, settings)
    # The rest of lse is one factor of the row, so the last product includes it.
    rest = torch.exp(-lse_low)
    y.sub_(lse[:, None])
    if of_statistics:
        of_p, of_pz = of_statistics
        of_p = of_p - of_pz * lse_low
        # Below this p is 0, and 0 * -inf is not.
        own = of_p - of_pz * nll.clamp(max=-_LEAST_LOG_P)
        at_target = grad * at_target + torch.exp(-nll) * own
        y.clamp_(min=_LEAST_LOG_P)
        factor = torch.addcmul((grad + of_p)[:, None], y, of_pz[:, None])
        y.exp_().mul_(factor)
        grad = torch.ones_like(grad)
    else:
        y.exp_()
    at_target = at_target / rest
    if settings.z_loss:
        y.mul_(probability[:, None])
    if uniform:
        y.sub_((uniform / rest)[:, None])
    column = (target - first)[:, None]
    inside = (column >= 0) & (column < y.shape[1])
    column = column.clamp(0, y.shape[1] - 1)
    y.scatter_(1, column, torch.where(inside, at_target[:, None], y.gather(1, column)))
    if slope is not None:
        y.mul_(slope)
    y.mul_((grad * rest / settings.temperature)[:, None])


def _from_entries(
    problem: Problem, grad: Tensor, saved: Saved, grad_weight: Tensor | None
) -> Gradients:
    """``dH`` gathers rows of ``weight``; ``dW`` gathers rows of ``hidden``, grouped by column.

    Each group makes one row of ``dW``, so every row is written once, and in order.
    """
    hidden, weight, wanted = problem.hidden, problem.weight, problem.wanted
    count, vocabulary, _ = problem.shape
    budget = problem.buffer_bytes
    columns, offsets = saved.csr_columns, saved.csr_offsets
    grad_hidden = grad_bias = None
    if wanted.hidden:
        grad_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
        lengths = offsets.diff().to(columns.dtype)  # int32, for an index of half the bytes
        row = torch.repeat_interleave(lengths, output_size=columns.numel())
        value = grad.index_select(0, row).mul_(saved.csr_values)
        del row
        add_weighted_rows(weight, columns, offsets[:-1], value, grad_hidden, budget)
        del value
    if grad_weight is None and not wanted.bias:
        return Gradients(grad_hidden, grad_weight, None)
    ones = grad.new_ones(count, 1)
    grad_bias = grad.new_zeros(vocabulary, 1)
    for first, stop, entry, starts in _by_column(columns, vocabulary):
        row = torch.searchsorted(offsets, entry, right=True) - 1
        value = saved.csr_values[entry] * grad[row]
        row = row.to(columns.dtype)
        if grad_weight is not None:
            add_weighted_rows(hidden, row, starts, value, grad_weight[first:stop], budget)
        if wanted.bias:
            add_weighted_rows(ones, row, starts, value, grad_bias[first:stop], budget)
    return Gradients(grad_hidden, grad_weight, grad_bias.squeeze(1) if wanted.bias else None)


def _by_column(
    columns: Tensor,  # [E] int32, sorted within a row
    vocabulary: int,
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Entries grouped by column, an eighth of them at a time.

    Sorting all at once would hold two to three times the bytes of the entries themselves.

    Yields:
        The columns ``first:stop`` of the part; its entries, int64, by column and then by row; and
        for each column the first of them.
    """
    counts = torch.bincount(columns, minlength=vocabulary)
    ends = counts.cumsum(0)
    eighths = torch.arange(1, 8, dtype=torch.int64, device=columns.device) * columns.numel() // 8
    bounds = [0, *torch.searchsorted(ends, eighths).tolist(), vocabulary]
    for first, stop in itertools.pairwise(bounds):
        if first == stop:
            continue
        entry = ((columns >= first) & (columns < stop)).nonzero().squeeze(1)
        entry = entry[torch.sort(columns[entry], stable=True).indices]
        starts = ends[first:stop] - counts[first:stop]
        yield first, stop, entry, starts - starts[0]


def add_weighted_rows(
    table: Tensor,  # [R, D]
    index: Tensor,  # [E] int32, rows of table
    offsets: Tensor,  # [G] int64, first entry of each group
    value: Tensor,  # [E], in the accumulator's type
    out: Tensor,  # [G, D]
    budget: int,
) -> None:
    """``out[g] += sum_e value[e] * table[index[e]]`` over the entries of group ``g``.

    Sums are in the type of ``value`` and in the order of the entries, so they are the same from run
    to run. A table of that type is read in place, by blocks of groups. A table of another type is
    converted in slices of its columns. Temporaries fit the budget.
    """
    bag = torch.nn.functional.embedding_bag
    if index.numel() >= 2**31:  # offsets have the type of the index
        index = index.long()
    groups, width = out.shape
    if table.dtype == value.dtype and table.is_contiguous():
        block = max(1, budget // (value.element_size() * width))
        starts = list(range(0, groups, block))
        bounds = [*offsets[starts].tolist(), index.numel()]
        for first, begin, end in zip(starts, bounds, bounds[1:], strict=False):
            inside = (offsets[first : first + block] - begin).to(index.dtype)
            part, values = index[begin:end], value[begin:end]
            out[first : first + block] += bag(
                part, table, inside, mode="sum", per_sample_weights=values
            )
        return
    slice_width = budget // (value.element_size() * (table.shape[0] + groups))
    slice_width = max(1, min(width, slice_width))
    offsets = offsets.to(index.dtype)
    for first in range(0, width, slice_width):
        stop = min(first + slice_width, width)
        part = table[:, first:stop].to(value.dtype).contiguous()
        sums = bag(index, part, offsets, mode="sum", per_sample_weights=value)
        out[:, first:stop] += sums.to(out.dtype)


@dataclass(frozen=True)
class ColumnPlan:
    """Blocks of the vocabulary: ``[rows, columns]`` logits, many rows against few columns."""

    rows: int
    columns: int


def plan_columns(
    rows: int,
    vocabulary: int,
    width: int,
    itemsize: int,
    budget: int,
    *,
    copies: bool,
    scratch: int,
) -> ColumnPlan:
    """Block sizes for the recomputing backward, whose ``lse`` is known.

    A block costs ``(1 + scratch) * rows * columns`` logits, a widened block of ``weight``, one of
    ``dW`` and, with ``copies``, one of ``hidden``. Products are fastest with all rows against a few
    columns, as long as the block keeps some hundreds of columns. If it cannot, rows are split too.
    """
    elements = max(1, budget // itemsize)
    copied = width if copies else 0
    block_rows, wanted = 0, min(vocabulary, 512)
    while True:
        block_rows = (elements - 2 * width * wanted) // ((1 + scratch) * wanted + copied)
        # One row against many columns is no GEMM, so a block has as many rows as columns.
        if block_rows >= min(rows, wanted) or wanted == 1:
            break
        wanted //= 2
    block_rows = max(1, min(rows, block_rows))
    columns = (elements - copied * block_rows) // ((1 + scratch) * block_rows + 2 * width)
    return ColumnPlan(block_rows, max(1, min(vocabulary, columns)))
