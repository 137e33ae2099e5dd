"""The forward of the core op: one pass over blocks of the vocabulary."""

import torch
from torch import Tensor

from bft_kernels import _cpu
from bft_kernels.backends.common.gemm import squared_norms
from bft_kernels.backends.common.lse_bound import ROUNDING
from bft_kernels.backends.common.rows import LabelledRows, packed
from bft_kernels.backends.cpu import team
from bft_kernels.backends.cpu.backward import recompute
from bft_kernels.backends.cpu.native import (
    Block,
    Operands,
    RowTargets,
    address,
    all_blocks,
    each_block,
    finish,
    make_softmax,
    plan,
    threads,
)
from bft_kernels.problem import Problem
from bft_kernels.results import Forward

# How many of the targets' rows of weight are gathered at a time.
_ROWS_AT_A_TIME = 64


def linear_nll(problem: Problem) -> Forward:
    """Losses and statistics of every labelled row, and what ``problem.saved`` says is kept."""
    rows = LabelledRows(problem.target, problem.settings.ignore_index)
    wants_unit = problem.saved == "unit"
    blocks = plan(problem, rows, products=2 if wants_unit else 1, trains_weight=False)
    operands = Operands(problem, rows, blocks)
    bias = None if problem.bias is None else problem.bias.float().contiguous()
    norms = None
    if problem.hidden_variance:
        norms = squared_norms(problem.weight, torch.float32, problem.buffer_bytes)
    targets = rows.take(problem.target, 0, rows.size).contiguous()
    positions = lse_bound = None
    if problem.saved == "entries":
        positions = rows.positions(0, rows.size)
        lse_bound = bounds_of(operands, targets, bias, problem)
    softmax = make_softmax(
        problem,
        targets,
        bias,
        blocks.team,
        positions=positions,
        lse_bound=lse_bound,
        norms=norms,
    )
    # With smoothing dy has a second term, which the sum of the first cannot include.
    unit = wants_unit and not problem.settings.label_smoothing
    width = problem.shape[2]
    sums = torch.zeros(rows.size if unit else 0, width, dtype=torch.float32, device="cpu")
    if unit:

        def add(block: Block) -> None:
            softmax.add_exponentials(
                block.arguments(), address(sums), width, block.threads, block.worker
            )
            sums[block.first_row : block.stop_row].addmm_(block.logits, block.columns)

        each_block(operands, add)
    else:
        all_blocks(softmax, operands)
    results = finish(softmax, rows.size, problem)
    if unit:
        finish_unit(softmax, sums, operands, targets)
    elif wants_unit:
        lse = results["lse"]
        ones = torch.ones_like(lse)
        known = RowTargets(targets, lse, results["lse_low"], results["nll"], upstream=ones)
        grad, _ = recompute(problem, operands, known, bias)
        assert grad is not None
        sums = grad
    return pack(softmax, results, sums, rows, problem)


def bounds_of(operands: Operands, targets: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """A lower bound of each row's ``lse``: its target's logit, minus the largest rounding error.

    For a confident token this keeps the other entries out until the softmax reaches the target.
    """
    bound = torch.empty(targets.numel(), dtype=torch.float32, device="cpu")
    block, settings = _ROWS_AT_A_TIME, problem.settings

    def find(worker: int, number: int, step: int) -> None:
        a = number * block
        part = targets[a : a + block]
        product = operands.take(a, a + part.numel()) * operands.columns_at(part)
        y = product.sum(dim=1) - ROUNDING * product.abs_().sum(dim=1)
        if bias is not None:
            y += bias[part] - ROUNDING * bias[part].abs()
        if settings.softcap is not None:
            y = settings.softcap * torch.tanh(y / settings.softcap) - ROUNDING * settings.softcap
        bound[a : a + block] = y / settings.temperature

    parts = -(-targets.numel() // block)
    team.run(team.Blocks(parts, 1, reach=1), find, operands.plan.team)
    return bound.sub_(ROUNDING * bound.abs())


def finish_unit(
    softmax: _cpu.OnlineSoftmax, sums: Tensor, operands: Operands, targets: Tensor
) -> None:
    """Turns sums of exponentials times rows of ``weight`` into ``dH``, in place."""
    count, block = targets.numel(), _ROWS_AT_A_TIME
    factors = torch.empty(count, dtype=torch.float32, device="cpu")
    values = torch.empty_like(factors)
    softmax.unit_factors(0, count, address(factors), address(values))
    for a in range(0, count, block):
        part = slice(a, a + block)
        own = operands.columns_at(targets[part])
        sums[part].mul_(factors[part, None]).addcmul_(own, values[part, None])


def pack(
    softmax: _cpu.OnlineSoftmax,
    results: dict[str, Tensor],
    unit: Tensor,
    rows: LabelledRows,
    problem: Problem,
) -> Forward:
    """The results over all ``N`` rows."""
    lists = None
    if problem.saved == "entries":
        own, offsets = (
            torch.nn.functional.pad(counts.cumsum(0), (1, 0))
            for counts in (results["counts"], rows.spread(results["counts"]))
        )
        columns = torch.empty(int(own[-1]), dtype=torch.int32, device="cpu")
        values = torch.empty(int(own[-1]), dtype=torch.float32, device="cpu")
        softmax.entries(address(own), address(columns), address(values), threads())
        lists = {"csr_offsets": offsets, "csr_columns": columns, "csr_values": values}
    return packed(problem, results, unit if problem.saved == "unit" else None, lists, rows)
