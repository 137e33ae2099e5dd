"""Calls of ``bft_kernels._cpu``: tensors become addresses, and settings become keywords."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bft_kernels import _cpu
from bft_kernels.backends.common.gemm import as_operand
from bft_kernels.backends.common.rows import LabelledRows, row_results
from bft_kernels.backends.cpu import team
from bft_kernels.backends.cpu.plan import CPU_REACH, CpuPlan, cpu_block_bytes, plan_cpu_blocks
from bft_kernels.problem import Problem
from bft_kernels.settings import Settings


def address(tensor: Tensor | None) -> int:
    """The address of the first element; 0 for ``None``."""
    return 0 if tensor is None else tensor.data_ptr()


def has_rows(tensor: Tensor) -> bool:
    """Whether a matrix consists of contiguous rows that do not overlap."""
    rows, width = tensor.shape
    return (tensor.stride(1) == 1 or width == 1) and (tensor.stride(0) >= width or rows <= 1)


def matrix(tensor: Tensor) -> tuple[int, str, int, int, int]:
    """A matrix of contiguous rows, as ``_cpu`` takes it. ``tensor`` must outlive the call."""
    assert has_rows(tensor)
    name = str(tensor.dtype).removeprefix("torch.")
    return tensor.data_ptr(), name, *tensor.shape, tensor.stride(0)


def threads() -> int:
    """The number of threads: as many as torch's own operators use."""
    return torch.get_num_threads()


def transform(bias: Tensor | None, settings: Settings) -> dict[str, Any]:
    """How raw products become logits. ``bias`` is float32 and must outlive the call."""
    return {
        "bias": address(bias),
        "softcap": settings.softcap or 0.0,
        "temperature": settings.temperature,
    }


class RowTargets(NamedTuple):
    """The values that a row's gradient needs besides its logits; ``[n]`` each, of labelled rows."""

    targets: Tensor  # int64
    lse: Tensor
    lse_low: Tensor
    nll: Tensor
    upstream: Tensor  # float32, like lse

    def part(self, first: int, stop: int) -> RowTargets:
        """Rows ``first:stop``."""
        return RowTargets(*[values[first:stop] for values in self])


class Block(NamedTuple):
    """Raw products of some rows with some columns of the vocabulary."""

    first_row: int
    first_column: int
    logits: Tensor  # [rows, columns], contiguous rows
    operand: Tensor  # [rows, D], the left factor of the product
    columns: Tensor  # [columns, D], the right factor
    threads: int  # how many threads work on it
    worker: int = 0  # the worker that computes it, if blocks are computed at the same time

    @property
    def stop_row(self) -> int:
        return self.first_row + self.logits.shape[0]

    @property
    def stop_column(self) -> int:
        return self.first_column + self.logits.shape[1]

    def arguments(self) -> tuple[int, int, int, int, int, int]:
        z = self.logits
        rows, columns = z.shape
        return z.data_ptr(), z.stride(0), self.first_row, rows, self.first_column, columns


def converts(x: Tensor, operand: torch.dtype) -> bool:
    """Whether ``x`` is copied to float32, in blocks, before a product."""
    return not x.dtype == operand == torch.float32


def limits(problem: Problem, rows: LabelledRows) -> dict[str, Any]:
    """What all plans take: the copies of operands, the caches, and the threads."""
    most = threads()
    return {
        "widens": converts(problem.weight, problem.operand),
        "copies": rows.copies or converts(problem.hidden, problem.operand),
        "block_bytes": cpu_block_bytes(most),
        "threads": most,
    }


def plan(problem: Problem, rows: LabelledRows, *, products: int, trains_weight: bool) -> CpuPlan:
    """Block sizes for ``products`` products of each block; see :func:`plan_cpu_blocks`."""
    return plan_cpu_blocks(
        rows.size,
        *problem.shape[1:],
        problem.buffer_bytes,
        products=products,
        narrow_gradient=trains_weight and problem.weight.dtype != torch.float32,
        **limits(problem, rows),
    )


class _Widened:
    """A block of ``weight`` in float32, for all threads that need it."""

    def __init__(self, columns: int, width: int) -> None:
        self.values = torch.empty(columns, width, dtype=torch.float32, device="cpu")
        self.holds = (0, 0)  # the columns that it holds
        self.lock = threading.Lock()

    def take(self, part: Tensor, columns: tuple[int, int], operand: torch.dtype) -> Tensor:
        values = self.values[: columns[1] - columns[0]]
        with self.lock:
            if self.holds != columns:
                values.copy_(part.to(operand))
                self.holds = columns
        return values


class Operands:
    """The labelled rows of ``hidden`` and blocks of ``weight`` as float32 operands."""

    def __init__(self, problem: Problem, rows: LabelledRows, plan: CpuPlan) -> None:
        self.hidden, self.weight, self.type = problem.hidden, problem.weight, problem.operand
        self.rows, self.plan = rows, plan
        copies = rows.copies or converts(self.hidden, self.type)
        self.all_rows = self.hidden if not copies else None
        if copies and plan.whole:
            self.all_rows = self._take(0, rows.size)
        self.widened: list[_Widened] = []  # blocks of weight, as many as are in use at a time
        if converts(self.weight, self.type):
            live = CPU_REACH if plan.team > 1 else 1
            self.widened = [_Widened(plan.columns, self.weight.shape[1]) for _ in range(live)]

    def _take(self, first: int, stop: int) -> Tensor:
        part = self.rows.take(self.hidden, first, stop)
        if not converts(part, self.type):
            return part
        return as_operand(part, self.type, torch.float32)

    def take(self, first: int, stop: int) -> Tensor:
        """Rows of ``hidden``, ``[stop - first, D]``."""
        return self._take(first, stop) if self.all_rows is None else self.all_rows[first:stop]

    def columns(self, step: int, first: int, stop: int) -> Tensor:
        """Rows of ``weight``, ``[stop - first, D]``: at most ``plan.columns`` rows.

        If they are widened, step ``step + CPU_REACH`` overwrites them, or the next step if the plan
        has no team.
        """
        part = self.weight[first:stop]
        if not self.widened:
            return part
        return self.widened[step % len(self.widened)].take(part, (first, stop), self.type)

    def columns_at(self, index: Tensor) -> Tensor:
        """``weight[index]``."""
        return as_operand(self.weight[index], self.type, torch.float32)


def each_block(
    operands: Operands, visit: Callable[[Block], None], *, in_turn: bool = False
) -> None:
    """Calls ``visit`` for every block of products, in a buffer that its worker uses again.

    If the plan has a team, parts of the rows are computed at the same time. Each part takes the
    blocks of the vocabulary in their order. If they are ``in_turn``, the parts also go through each
    block in their order.
    """
    plan, count = operands.plan, operands.rows.size
    vocabulary = operands.weight.shape[0]
    space = plan.rows * plan.columns
    buffer = torch.empty(plan.team * space, dtype=torch.float32, device="cpu")
    team_of_one = threads() if plan.team == 1 else 1

    def compute(worker: int, part: int, step: int) -> None:
        a, first = part * plan.rows, step * plan.columns
        b, stop = min(a + plan.rows, count), min(first + plan.columns, vocabulary)
        begin, size = worker * space, (b - a) * (stop - first)
        out = buffer[begin : begin + size].view(b - a, stop - first)
        operand, columns = operands.take(a, b), operands.columns(step, first, stop)
        torch.mm(operand, columns.T, out=out)
        visit(Block(a, first, out, operand, columns, team_of_one, worker))

    parts, steps = -(-count // plan.rows), -(-vocabulary // plan.columns)
    team.run(team.Blocks(parts, steps, CPU_REACH, in_turn=in_turn), compute, plan.team)


def all_blocks(softmax: _cpu.OnlineSoftmax, operands: Operands) -> None:
    """Adds all blocks to ``softmax``, and frees their buffer."""
    each_block(
        operands,
        lambda block: softmax.add(block.arguments(), threads=block.threads, worker=block.worker),
    )


def make_softmax(
    problem: Problem,
    targets: Tensor,  # [n], of the rows
    bias: Tensor | None,  # [V] float32
    workers: int,
    *,
    positions: Tensor | None = None,  # [n], of the rows: for a sample
    lse_bound: Tensor | None = None,  # [n], likewise
    norms: Tensor | None = None,  # [V], for hidden_variance
) -> _cpu.OnlineSoftmax:
    """The state of a forward, to which ``workers`` workers add blocks at the same time.

    The tensors must outlive the state.
    """
    settings = problem.settings
    return _cpu.OnlineSoftmax(
        rows=targets.numel(),
        vocabulary=problem.weight.shape[0],
        targets=address(targets),
        positions=address(positions),
        lse_bounds=address(lse_bound),
        norms=address(norms),
        eps=settings.eps,
        seed=0 if problem.seed is None else int(problem.seed),
        sample=problem.saved == "entries",
        certificate=problem.variance,
        label_smoothing=settings.label_smoothing,
        z_loss=settings.z_loss,
        workers=workers,
        **transform(bias, settings),
    )


def finish(softmax: _cpu.OnlineSoftmax, count: int, problem: Problem) -> dict[str, Tensor]:
    """The results of the ``count`` rows of ``softmax``, ``[count]`` each; empty if not wanted."""
    results = row_results(problem, count)
    if problem.saved == "entries":
        results["counts"] = torch.empty(count, dtype=torch.int64, device="cpu")
    addresses = {name: address(x) for name, x in results.items() if x.numel()}
    softmax.finish(0, count, addresses, threads())
    return results
