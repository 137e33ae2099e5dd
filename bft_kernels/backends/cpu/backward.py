"""The backward of the core op, from recomputed logits or from the sampled entries."""

import torch
from torch import Tensor

from bft_kernels import _cpu
from bft_kernels.backends.common.rows import LabelledRows
from bft_kernels.backends.cpu.native import (
    Block,
    Operands,
    RowTargets,
    address,
    each_block,
    has_rows,
    matrix,
    plan,
    threads,
    transform,
)
from bft_kernels.backends.cpu.plan import cpu_cache_bytes, plan_cpu_slice
from bft_kernels.problem import Problem
from bft_kernels.results import Gradients, Saved
from bft_kernels.settings import Settings


def linear_nll_backward(
    problem: Problem,
    grad: Tensor,  # [N]
    saved: Saved,
    grad_weight: Tensor | None = None,  # [V, D], added to in place; a new one if None
) -> Gradients:
    """The wanted gradients of ``sum(grad * loss)``."""
    hidden, weight, wanted = problem.hidden, problem.weight, problem.wanted
    rows = LabelledRows(problem.target, problem.settings.ignore_index)
    grad = torch.where(rows.labelled, grad, 0).float()
    if problem.settings.gradient == "sampled":
        return _from_entries(problem, grad, saved, grad_weight)
    add = grad_weight is not None
    if not wanted.weight:
        grad_weight = None
    elif grad_weight is None:
        grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device="cpu")
    blocks = plan(problem, rows, products=3, trains_weight=wanted.weight)
    saved_values = (problem.target, saved.lse, saved.lse_low, saved.nll, grad)
    known = RowTargets(*[rows.take(x, 0, rows.size).contiguous() for x in saved_values])
    bias = None if problem.bias is None else problem.bias.float().contiguous()
    grad_hidden, grad_bias = recompute(
        problem, Operands(problem, rows, blocks), known, bias, grad_weight, add=add
    )
    if grad_hidden is not None:
        grad_hidden = rows.spread(grad_hidden, hidden.dtype)
    return Gradients(grad_hidden, grad_weight, grad_bias)


def recompute(
    problem: Problem,
    operands: Operands,
    known: RowTargets,
    bias: Tensor | None,  # [V] float32
    grad_weight: Tensor | None = None,  # [V, D], written or added to
    *,
    add: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """``dH [n, D]`` and ``db [V]`` in float32, from logits computed again.

    All rows go through a block of the vocabulary before the next block but one begins. So each
    block of ``dW`` is accumulated in float32 while it is in cache, and is written once.
    """
    _, vocabulary, width = problem.shape
    count, wanted = operands.rows.size, problem.wanted
    grad_hidden = (
        torch.zeros(count, width, dtype=torch.float32, device="cpu") if wanted.hidden else None
    )
    grad_bias = torch.zeros(vocabulary, dtype=torch.float32, device="cpu") if wanted.bias else None
    if grad_weight is not None and count == 0 and not add:
        grad_weight.zero_()
    narrow: dict[int, Tensor] = {}  # blocks of dW while they are accumulated in float32

    def take(block: Block) -> None:
        part = slice(block.first_row, block.stop_row)
        rows = known.part(block.first_row, block.stop_row)
        write_gradient(block, rows, bias, problem.settings, vocabulary)
        columns = slice(block.first_column, block.stop_column)
        if grad_hidden is not None:
            grad_hidden[part].addmm_(block.logits, block.columns)
        if grad_bias is not None:
            grad_bias[columns].add_(block.logits.sum(dim=0))
        if grad_weight is None:
            return
        if grad_weight.dtype == torch.float32:
            beta = 1 if add or block.first_row > 0 else 0
            grad_weight[columns].addmm_(block.logits.T, block.operand, beta=beta)
            return
        into = narrow.pop(block.first_column, None)
        if into is None and add:
            into = grad_weight[columns].float()
        if into is None:
            into = block.logits.T @ block.operand
        else:
            into.addmm_(block.logits.T, block.operand)
        if block.stop_row == count:
            grad_weight[columns] = into
        else:
            narrow[block.first_column] = into

    each_block(operands, take, in_turn=grad_weight is not None or grad_bias is not None)
    return grad_hidden, grad_bias


def write_gradient(
    block: Block,
    rows: RowTargets,
    bias: Tensor | None,
    settings: Settings,
    vocabulary: int,
    kept: Tensor | None = None,
) -> None:
    """Overwrites a block of raw products with ``upstream * dy``.

    Args:
        block: the block that is overwritten.
        rows: the known values of the block's rows.
        bias: ``[V]`` float32.
        settings: the settings of the call.
        vocabulary: ``V``.
        kept: ``[rows * columns]``, the block's logits if :meth:`_cpu.OnlineSoftmax.add` kept them.
            Then the block may hold anything.
    """
    _cpu.gradient_block(
        block=block.arguments(),
        vocabulary=vocabulary,
        kept=address(kept),
        label_smoothing=settings.label_smoothing,
        z_loss=settings.z_loss,
        threads=block.threads,
        **{name: address(values) for name, values in rows._asdict().items()},
        **transform(bias, settings),
    )


def _from_entries(
    problem: Problem,
    grad: Tensor,  # [N]
    saved: Saved,
    grad_weight: Tensor | None,
) -> Gradients:
    """``dH = S @ W`` and ``dW = S.T @ H`` for the saved sample ``S``; both are written once."""
    hidden, weight, wanted = problem.hidden, problem.weight, problem.wanted
    entries = {
        "rows": hidden.shape[0],
        "offsets": address(saved.csr_offsets),
        "columns": address(saved.csr_columns),
        "values": address(saved.csr_values),
        "upstream": address(grad),
        "threads": threads(),
    }
    grad_hidden = grad_bias = None
    if wanted.hidden:
        grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        _cpu.spmm_hidden(weight=matrix(weight), grad_hidden=matrix(grad_hidden), **entries)
    into: Tensor | None = None
    if wanted.weight:
        add = grad_weight is not None and has_rows(grad_weight)
        into = grad_weight if add else torch.empty(weight.shape, dtype=weight.dtype, device="cpu")
    if wanted.bias:
        grad_bias = torch.empty(weight.shape[0], dtype=torch.float32, device="cpu")
    if wanted.weight or wanted.bias:
        table = hidden if has_rows(hidden) else hidden.contiguous()
        _cpu.spmm_weight(
            hidden=matrix(table),
            grad_weight=None if into is None else matrix(into),
            add=into is grad_weight,
            grad_bias=address(grad_bias),
            vocabulary=weight.shape[0],
            slice=plan_cpu_slice(
                table.shape[0], table.shape[1], table.element_size(), cpu_cache_bytes()
            ),
            **entries,
        )
    if into is not None and grad_weight is not None and into is not grad_weight:
        into = grad_weight.add_(into)
    return Gradients(grad_hidden, into, grad_bias)
