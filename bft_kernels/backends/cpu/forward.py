"""The forward of the core op: one pass over blocks of the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from bft_kernels import _cpu
from bft_kernels.backends.cpu import team
from bft_kernels.backends.cpu.backward import recompute
from bft_kernels.backends.cpu.native import (
    Block,
    KnownRows,
    Operands,
    address,
    each_block,
    finish,
    make_sweep,
    plan,
    sweep_all,
    threads,
    wanted_results,
)
from bft_kernels.backends.torch.forward import squared_norms
from bft_kernels.backends.torch.rows import LabelledRows
from bft_kernels.config import CoreConfig, storage
from bft_kernels.results import Forward, Wanted

# Of the targets' rows of weight, which are gathered.
_ROWS_AT_A_TIME = 64


def linear_nll(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [N]
    bias: Tensor | None,  # [V]
    seed: Tensor | None,  # []
    config: CoreConfig,
) -> Forward:
    """Losses and statistics of every labelled row, and the residual that ``config`` asks for."""
    rows = LabelledRows(target, config.ignore_index)
    vocabulary, width = weight.shape
    products = {"unit": 2}.get(config.residual, 1)
    operands = Operands(
        hidden, weight, rows, config, plan(hidden, weight, rows, config, products=products)
    )
    bias = None if bias is None else bias.float().contiguous()
    norms = None
    if config.hidden_variance:
        norms = squared_norms(weight, torch.float32, config.max_buffer_bytes)
    targets = rows.take(target, 0, rows.count).contiguous()
    sampled = config.residual == "entries"
    sweep = make_sweep(
        targets,
        rows.positions(0, rows.count),
        bias,
        norms,
        floors(operands, targets, bias, config) if sampled else None,
        0 if seed is None else int(seed),
        vocabulary,
        config,
        operands.plan.team,
    )
    # With smoothing dy has a second part, which cannot ride on the sum of the first.
    unit = config.residual == "unit" and not config.label_smoothing
    sums = torch.zeros(rows.count if unit else 0, width, dtype=torch.float32, device="cpu")
    if unit:

        def add(block: Block) -> None:
            sweep.add_exponentials(
                block.arguments(), address(sums), width, block.threads, block.worker
            )
            sums[block.first_row : block.stop_row].addmm_(block.logits, block.columns)

        each_block(operands, add)
    else:
        sweep_all(sweep, operands)
    results = finish(sweep, 0, rows.count, wanted_results(config))
    if unit:
        finish_unit(sweep, sums, operands, targets)
    elif config.residual == "unit":
        lse = results["lse"]
        known = KnownRows(
            targets, lse, results["lse_low"], results["nll"], upstream=torch.ones_like(lse)
        )
        grad, _ = recompute(operands, known, bias, config, Wanted(True, False, False))
        assert grad is not None
        sums = grad
    return pack(sweep, results, sums, rows, hidden, config)


def floors(operands: Operands, targets: Tensor, bias: Tensor | None, config: CoreConfig) -> Tensor:
    """A lower bound of each row's ``lse``: its target's logit, less what rounding can make of it.

    Until the sweep arrives at a confident token's target, this is what keeps the other entries out.
    """
    bound = torch.empty(targets.numel(), dtype=torch.float32, device="cpu")
    block = _ROWS_AT_A_TIME

    def find(worker: int, number: int, step: int) -> None:
        a = number * block
        part = targets[a : a + block]
        product = operands.take(a, a + part.numel()) * operands.columns_at(part)
        y = product.sum(dim=1) - 1e-5 * product.abs_().sum(dim=1)
        if bias is not None:
            y += bias[part] - 1e-6 * bias[part].abs()
        if config.softcap is not None:
            y = config.softcap * torch.tanh(y / config.softcap) - 1e-5 * config.softcap
        bound[a : a + block] = y / config.temperature

    parts = -(-targets.numel() // block)
    team.run(team.Blocks(parts, 1, reach=1), find, operands.plan.team)
    return bound.sub_(1e-5 * bound.abs())


def finish_unit(sweep: _cpu.Sweep, sums: Tensor, operands: Operands, targets: Tensor) -> None:
    """Turns sums of exponentials times rows of ``weight`` into ``dH``, in place."""
    count, block = targets.numel(), _ROWS_AT_A_TIME
    factors = torch.empty(count, dtype=torch.float32, device="cpu")
    values = torch.empty_like(factors)
    sweep.unit_factors(0, count, address(factors), address(values))
    for a in range(0, count, block):
        part = slice(a, a + block)
        own = operands.columns_at(targets[part])
        sums[part].mul_(factors[part, None]).addcmul_(own, values[part, None])


def pack(
    sweep: _cpu.Sweep,
    results: dict[str, Tensor],
    unit: Tensor,
    rows: LabelledRows,
    hidden: Tensor,
    config: CoreConfig,
) -> Forward:
    """The results as tensors over all ``N`` rows."""
    full = {name: rows.spread(x) if x.numel() else x for name, x in results.items()}
    if rows.count == 0:
        full = {
            name: x.new_zeros(rows.total if want else 0)
            for (name, x), want in zip(full.items(), wanted_results(config).values(), strict=True)
        }
    offsets = torch.empty(0, dtype=torch.int64, device="cpu")
    entries = 0
    if config.residual == "entries":
        offsets = torch.nn.functional.pad(full["counts"].cumsum(0), (1, 0))
        entries = int(offsets[-1])
    columns = torch.empty(entries, dtype=torch.int32, device="cpu")
    values = torch.empty(entries, dtype=torch.float32, device="cpu")
    if config.residual == "entries":
        own = torch.nn.functional.pad(results["counts"].cumsum(0), (1, 0))
        sweep.entries(address(own), address(columns), address(values), threads())
    return Forward(
        loss=full["loss"],
        nll=full["nll"],
        lse=full["lse"],
        lse_low=full["lse_low"] if config.residual == "recompute" else unit.new_empty(0),
        entropy=full["entropy"],
        correct=full["correct"],
        variance=full["variance"],
        hidden_variance=full["hidden_variance"],
        unit=rows.spread(unit, storage(hidden.dtype))
        if config.residual == "unit"
        else hidden.new_empty((0, hidden.shape[1]), dtype=storage(hidden.dtype)),
        entry_offsets=offsets,
        entry_columns=columns,
        entry_values=values,
    )
