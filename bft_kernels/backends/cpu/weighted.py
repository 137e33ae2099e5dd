"""A weighted sum of token losses and its gradients, in two passes over blocks of the vocabulary.

The first pass gives the losses, and from them come the weights. The second pass turns logits into
gradients. In between, logits wait if there is room for them, which costs three products (3G).
Otherwise they are computed again (4G).
"""

import functools
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from bft_kernels import workspace
from bft_kernels.backends.common.rows import LabelledRows, row_results
from bft_kernels.backends.common.weighted import Piece, RowDocuments, WeightedSums
from bft_kernels.backends.cpu import team
from bft_kernels.backends.cpu.backward import write_gradient
from bft_kernels.backends.cpu.native import (
    Block,
    Operands,
    RowTargets,
    address,
    finish,
    limits,
    make_softmax,
    threads,
)
from bft_kernels.backends.cpu.plan import (
    CPU_REACH,
    PIECE_STEP,
    CpuPlan,
    CpuWeightedPlan,
    cpu_part,
    cpu_team,
    plan_cpu_pieces,
    plan_cpu_weighted,
)
from bft_kernels.problem import Problem
from bft_kernels.results import Documents, WeightedLoss
from bft_kernels.weighting import balance


def weighted_loss(
    problem: Problem,
    token_scale: Tensor,  # [N], the factor of each token's weight; see `token_scales`
    documents: Documents | None,  # None for weights local to a token
) -> WeightedLoss:
    """The loss and its gradients for unit upstream gradient."""
    rows = LabelledRows(problem.target, problem.settings.ignore_index)
    plan = plan_cpu_weighted(
        rows.size,
        *problem.shape[1:],
        problem.buffer_bytes,
        trains_weight=problem.wanted.weight,
        **limits(problem, rows),
    )
    sums = WeightedSums(problem, rows, documents, row_results(problem, rows.size), balance)
    engine = _Engine(problem, rows, plan, sums)
    token_scale = rows.take(token_scale.float(), 0, rows.size)
    for piece in _pieces(rows, sums.documents, plan):
        engine.find_losses(piece)
        coefficient = token_scale[piece.first : piece.stop] * sums.token_weights_of(piece)
        sums.add_losses(piece, coefficient)
        engine.add_gradients(piece, coefficient)
    engine.end()
    return sums.result()


def _pieces(
    rows: LabelledRows, documents: RowDocuments | None, plan: CpuWeightedPlan
) -> Iterator[Piece]:
    """Documents that are taken together. If weights are local to a token, any rows go together."""
    if documents is None:
        bounds = [*range(0, rows.size, PIECE_STEP), rows.size]
    else:
        bounds = documents.bounds
    for begin, end in pairwise(plan_cpu_pieces(bounds, plan)):
        first, stop = bounds[begin], bounds[end]
        if documents is None:
            yield Piece(first, stop)
        else:
            own = documents.cu_seqlens[begin : end + 1] - first
            yield Piece(first, stop, own, slice(begin, end))


class _Waiting:
    """The logits of the first rows of a piece, between their softmax and their gradient.

    They wait in the memory of ``dW`` and in a buffer, in the blocks of columns that the first pass
    took, one after the other. In each block the first rows, at most ``D``, are in ``dW``, and the
    next ones in the buffer.
    """

    def __init__(self, in_gradient: int, in_buffer: int, grad_weight: Tensor, buffer: Tensor):
        self.in_gradient, self.rows = in_gradient, in_gradient + in_buffer
        width = grad_weight.shape[1]
        self.places = (
            # first and last row, the memory, and its floats for each column of the vocabulary
            (0, in_gradient, grad_weight.view(-1), width),
            (in_gradient, self.rows, buffer, in_buffer),
        )

    def parts(
        self, first: int, stop: int, columns: tuple[int, int]
    ) -> Iterator[tuple[int, int, Tensor | None]]:
        """The parts of a block's rows ``first:stop``: bounds, and the memory where they wait."""
        width = columns[1] - columns[0]
        for begin, end, memory, per_column in self.places:
            a, b = max(first, begin), min(stop, end)
            if a < b:
                place = columns[0] * per_column + (a - begin) * width
                yield a, b, memory[place : place + (b - a) * width]
        if stop > self.rows:
            yield max(first, self.rows), stop, None


class _Task(NamedTuple):
    """A block of a piece, the worker that computes it, and how many threads it uses."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    step: int  # the step of the columns
    space: Tensor  # [rows, columns], for logits or their gradient
    worker: int
    threads: int


class _Engine:
    """Computes pieces of the batch. Each logit is read while its block is in cache."""

    def __init__(
        self, problem: Problem, rows: LabelledRows, plan: CpuWeightedPlan, sums: WeightedSums
    ) -> None:
        self.problem, self.plan, self.sums = problem, plan, sums
        self.bias = None if problem.bias is None else problem.bias.float().contiguous()
        block_columns = plan.columns * plan.group
        blocks = CpuPlan(plan.rows, block_columns, plan.whole, plan.team)
        self.operands = Operands(problem, rows, blocks)
        self.targets = rows.take(problem.target, 0, rows.size).contiguous()
        self.buffer: Tensor | None = None  # borrowed from the first piece on
        # Each worker has a block, and there is a larger one if the rows that wait in dW need it.
        self.own_block = plan.rows * block_columns
        self.larger = plan.in_gradient * block_columns if plan.in_gradient > plan.rows else 0
        size = self.own_block * plan.team + self.larger if plan.team > 1 else 0
        self.block = torch.empty(
            max(size, self.own_block, self.larger), dtype=torch.float32, device="cpu"
        )
        self.waiting: _Waiting | None = None
        self.columns = plan.columns  # of a block of the piece
        self.operand = problem.hidden[:0]  # of the rows that wait

    def _wait(self, first: int, stop: int) -> _Waiting:
        """Makes room for the logits of a piece."""
        count, vocabulary = stop - first, self.problem.weight.shape[0]
        in_gradient = 0 if self.sums.added else self._rows_in_gradient(count)
        in_buffer = min(count - in_gradient, self.plan.in_buffer)
        if self.buffer is None:
            self.buffer = workspace.borrow(self.plan.in_buffer * vocabulary)
        self.operand = self.operands.take(first, first + in_gradient + in_buffer)
        return _Waiting(in_gradient, in_buffer, self.sums.grad_weight, self.buffer)

    def _rows_in_gradient(self, count: int) -> int:
        """How many of the first piece's rows wait in ``dW``. They are one part, see :meth:`_parts`.

        If the part would be a few rows too large, those rows do not wait there.
        """
        rows, members = min(count, self.plan.in_gradient), cpu_team(count, self.plan.team)
        most = _largest_part(count, members)
        return most if most < rows <= most + count // 8 else rows

    def _parts(self, count: int, least: int, width: int) -> tuple[int, list[tuple[int, int]]]:
        """The team for a piece of ``count`` rows, and its parts.

        The rows that wait have even parts, the first of ``least`` rows or more; the others have
        even parts, too. If one part is too large for a single thread's time or block, all threads
        share each block.
        """
        assert self.waiting is not None
        waiting, members = self.waiting.rows, cpu_team(count, self.plan.team)
        room = self.plan.team * self.plan.rows
        for size in (members, 1):
            rows = cpu_part(count, self.plan.rows if size > 1 else room, size)
            first = min(waiting, max(least, _even(waiting, max(rows, least))))
            parts = [(0, first)] if first else []
            for begin, end in ((first, waiting), (waiting, count)):
                parts += _steps(begin, end, _even(end - begin, rows))
            largest = max(b - a for a, b in parts)
            fits = largest * width <= max(self.own_block, self.larger)
            if largest <= _largest_part(count, size) and fits:
                break
        return size, parts

    def _run(
        self,
        count: int,
        least: int,
        width: int,
        compute: Callable[[_Task], None],
        *,
        in_turn: bool = False,
    ) -> None:
        """Computes all parts of a piece, ``width`` columns at a time; see :meth:`_parts`."""
        members, parts = self._parts(count, least, width)
        steps = list(_steps(0, self.problem.weight.shape[0], width))

        def task(worker: int, part: int, step: int) -> None:
            rows, columns = parts[part], steps[step]
            shape = rows[1] - rows[0], columns[1] - columns[0]
            size = shape[0] * shape[1]
            own = members == 1 or size <= self.own_block
            begin = (worker if own else self.plan.team) * self.own_block
            space = self.block[begin : begin + size].view(shape)
            each = threads() if members == 1 else 1
            compute(_Task(rows, columns, step, space, worker, each))

        blocks = team.Blocks(len(parts), len(steps), CPU_REACH, in_turn=in_turn)
        team.run(blocks, task, members)

    def _operand(self, first: int, rows: tuple[int, int]) -> Tensor:
        """The operand of ``rows`` of the piece that starts at row ``first``."""
        assert self.waiting is not None
        if rows[1] <= self.waiting.rows:
            return self.operand[slice(*rows)]
        return self.operands.take(first + rows[0], first + rows[1])

    def find_losses(self, piece: Piece) -> None:
        """Finds the losses of the rows of a piece. Logits wait as far as there is room."""
        first, stop = piece.first, piece.stop
        softmax = make_softmax(self.problem, self.targets[first:stop], self.bias, self.plan.team)
        self.waiting = self._wait(first, stop)
        self.columns = self.plan.columns_of(stop - first)

        def compute(task: _Task) -> None:
            assert self.waiting is not None
            rows, columns = task.rows, task.columns
            weight = self.operands.columns(task.step, *columns)
            operand = self._operand(first, rows)
            logits = torch.mm(operand, weight.T, out=task.space)
            for a, b, place in self.waiting.parts(*rows, columns):
                part = logits[a - rows[0] : b - rows[0]]
                block = Block(a, columns[0], part, operand, weight, task.threads, task.worker)
                softmax.add(
                    block.arguments(), address(place), threads=block.threads, worker=block.worker
                )

        self._run(stop - first, 0, self.columns, compute)
        for name, values in finish(softmax, stop - first, self.problem).items():
            if values.numel():
                self.sums.results[name][first:stop] = values

    def add_gradients(self, piece: Piece, coefficient: Tensor) -> None:
        """Adds the piece of the last :meth:`find_losses`, weighted, to the gradients."""
        assert self.waiting is not None
        first, stop, sums, wanted = piece.first, piece.stop, self.sums, self.problem.wanted
        part = slice(first, stop)
        all_rows = RowTargets(
            targets=self.targets[part],
            upstream=coefficient.contiguous(),
            **{name: sums.results[name][part] for name in ("lse", "lse_low", "nll")},
        )
        known = functools.cache(all_rows.part)  # the same few parts, over and over
        direct = sums.grad_hidden.dtype == torch.float32
        _, vocabulary, width = self.problem.shape
        grad_hidden = (
            sums.grad_hidden[part]
            if direct
            else torch.empty(stop - first, width, dtype=torch.float32, device="cpu")
        )

        settings = self.problem.settings

        def compute(task: _Task) -> None:
            assert self.waiting is not None
            rows, columns, dy = task.rows, task.columns, task.space
            weight = self.operands.columns(task.step, *columns)
            into = sums.grad_weight[slice(*columns)]
            operand = self._operand(first, rows)
            if rows[1] > self.waiting.rows:
                torch.mm(operand, weight.T, out=dy)
            for narrow in _steps(*columns, self.columns):
                for a, b, place in self.waiting.parts(*rows, narrow):
                    within = slice(narrow[0] - columns[0], narrow[1] - columns[0])
                    place_of = dy[a - rows[0] : b - rows[0], within]
                    block = Block(a, narrow[0], place_of, operand, weight, task.threads)
                    write_gradient(block, known(a, b), self.bias, settings, vocabulary, place)
            if wanted.hidden:
                grad_hidden[slice(*rows)].addmm_(dy, weight, beta=int(columns[0] > 0))
            if wanted.weight:
                into.addmm_(dy.T, operand, beta=int(sums.added or rows[0] > 0))
            if wanted.bias:
                sums.grad_bias[slice(*columns)] += dy.sum(dim=0)

        # The first part holds all rows that wait in dW, since its product overwrites them there.
        least, block_columns = self.waiting.in_gradient, self.columns * self.plan.group
        self._run(stop - first, least, block_columns, compute, in_turn=True)
        if wanted.hidden and not direct:
            sums.grad_hidden[part] = grad_hidden
        self.waiting, sums.added = None, True

    def end(self) -> None:
        """Gives back the borrowed buffer."""
        if self.buffer is not None:
            workspace.give_back(self.buffer)


def _largest_part(count: int, members: int) -> int:
    """The most of ``count`` rows that one of ``members`` threads may take while others wait."""
    return int(1.125 * count / members)


def _even(count: int, most: int) -> int:
    """The size of even parts of ``count``: as few parts as possible, none larger than ``most``."""
    return max(1, -(-count // max(1, -(-count // most))))


def _steps(first: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    """Bounds of the parts of ``first:stop``."""
    for begin in range(first, stop, step):
        yield begin, min(begin + step, stop)
