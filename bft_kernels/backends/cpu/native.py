"""Calls of ``bft_kernels._cpu``: tensors to addresses, settings to keywords."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bft_kernels import _cpu
from bft_kernels.backends.torch.matmul import as_operand, converts
from bft_kernels.backends.torch.rows import LabelledRows
from bft_kernels.config import CoreConfig
from bft_kernels.plan import CpuPlan, cpu_block_bytes, plan_cpu_blocks


def address(tensor: Tensor | None) -> int:
    """Of the first element; 0 for ``None``."""
    return 0 if tensor is None else tensor.data_ptr()


def has_rows(tensor: Tensor) -> bool:
    """Whether a matrix consists of contiguous rows that do not overlap."""
    rows, width = tensor.shape
    return (tensor.stride(1) == 1 or width == 1) and (tensor.stride(0) >= width or rows <= 1)


def matrix(tensor: Tensor) -> tuple[int, str, int, int, int]:
    """A matrix of contiguous rows as ``_cpu`` takes it. ``tensor`` must outlive the call."""
    assert has_rows(tensor)
    name = str(tensor.dtype).removeprefix("torch.")
    return tensor.data_ptr(), name, *tensor.shape, tensor.stride(0)


def threads() -> int:
    """As many as torch's own operators use."""
    return torch.get_num_threads()


def transform(bias: Tensor | None, config: CoreConfig) -> dict[str, Any]:
    """How raw products become logits. ``bias`` is float32 and must outlive the call."""
    return {
        "bias": address(bias),
        "softcap": config.softcap or 0.0,
        "temperature": config.temperature,
    }


class KnownRows(NamedTuple):
    """What the gradient of a row needs beside its logits; ``[n]`` each, of labelled rows."""

    targets: Tensor  # int64
    lse: Tensor
    lse_low: Tensor
    nll: Tensor
    upstream: Tensor  # float32, as the others

    def part(self, first: int, stop: int) -> KnownRows:
        """Rows ``first:stop``."""
        return KnownRows(*[values[first:stop] for values in self])


class Block(NamedTuple):
    """Raw products of some rows with some columns of the vocabulary."""

    first_row: int
    first_column: int
    logits: Tensor  # [rows, columns], contiguous rows
    operand: Tensor  # [rows, D], what was multiplied
    columns: Tensor  # [columns, D], by what

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


def plan(
    hidden: Tensor,
    weight: Tensor,
    rows: LabelledRows,
    config: CoreConfig,
    *,
    products: int = 1,
    trains_weight: bool = False,
) -> CpuPlan:
    """Block sizes for ``products`` products of each block; see :func:`plan_cpu_blocks`."""
    vocabulary, width = weight.shape
    return plan_cpu_blocks(
        rows.count,
        vocabulary,
        width,
        config.max_buffer_bytes,
        widens=converts(weight, config.operand_dtype, torch.float32),
        copies=rows.copies or converts(hidden, config.operand_dtype, torch.float32),
        products=products,
        narrow_gradient=trains_weight and weight.dtype != torch.float32,
        block_bytes=cpu_block_bytes(threads()),
    )


class Operands:
    """The labelled rows of ``hidden`` and blocks of ``weight`` as float32 operands."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, rows: LabelledRows, config: CoreConfig, plan: CpuPlan
    ) -> None:
        self.hidden, self.weight, self.rows, self.plan = hidden, weight, rows, plan
        self.type = config.operand_dtype
        copies = rows.copies or converts(hidden, self.type, torch.float32)
        self.all_rows = self._take(0, rows.count) if plan.whole or not copies else None
        self.wide: Tensor | None = None  # the widened block of weight
        if converts(weight, self.type, torch.float32):
            self.wide = torch.empty(
                plan.columns, weight.shape[1], dtype=torch.float32, device="cpu"
            )

    def _take(self, first: int, stop: int) -> Tensor:
        return as_operand(self.rows.take(self.hidden, first, stop), self.type, torch.float32)

    def take(self, first: int, stop: int) -> Tensor:
        """Rows of ``hidden``, ``[stop - first, D]``."""
        return self._take(first, stop) if self.all_rows is None else self.all_rows[first:stop]

    def columns(self, first: int, stop: int) -> Tensor:
        """Rows of ``weight``, ``[stop - first, D]``; overwritten by the next call if widened."""
        part = self.weight[first:stop]
        return part if self.wide is None else self.wide[: stop - first].copy_(part.to(self.type))

    def columns_at(self, index: Tensor) -> Tensor:
        """``weight[index]``."""
        return as_operand(self.weight[index], self.type, torch.float32)


def blocks(operands: Operands) -> Iterator[Block]:
    """All products in one reused buffer: a block of ``weight`` is read once."""
    plan, count = operands.plan, operands.rows.count
    vocabulary = operands.weight.shape[0]
    buffer = torch.empty(plan.rows * plan.columns, dtype=torch.float32, device="cpu")
    parts = [(a, min(a + plan.rows, count)) for a in range(0, count, plan.rows)]
    width = 0
    for first in range(0, vocabulary, plan.columns):
        stop = min(first + plan.columns, vocabulary)
        columns = operands.columns(first, stop)
        if width != stop - first:  # little is left to do between two products
            width = stop - first
            spaces = [buffer[: (b - a) * width].view(b - a, width) for a, b in parts]
        transposed = columns.T
        for (a, b), out in zip(parts, spaces, strict=True):
            operand = operands.take(a, b)
            torch.mm(operand, transposed, out=out)
            yield Block(a, first, out, operand, columns)


def sweep_all(sweep: _cpu.Sweep, operands: Operands) -> None:
    """Takes all blocks through ``sweep``; the buffer is gone afterwards."""
    team = threads()
    for block in blocks(operands):
        sweep.add(block.arguments(), threads=team)


def make_sweep(
    targets: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    norms: Tensor | None,
    floors: Tensor | None,
    seed: int,
    vocabulary: int,
    config: CoreConfig,
) -> _cpu.Sweep:
    """The state of a forward over ``targets [n]``."""
    return _cpu.Sweep(
        rows=targets.numel(),
        vocabulary=vocabulary,
        targets=address(targets),
        positions=address(positions),
        floors=address(floors),
        norms=address(norms),
        eps=config.eps,
        seed=seed,
        sample=config.residual == "entries",
        certificate=config.variance or config.hidden_variance,
        label_smoothing=config.label_smoothing,
        z_loss=config.z_loss,
        **transform(bias, config),
    )


def finish(sweep: _cpu.Sweep, first: int, count: int, wanted: dict[str, bool]) -> dict[str, Tensor]:
    """Results of the rows from ``first`` on, ``[count]`` each; empty where not wanted."""
    kinds = {"correct": torch.bool, "counts": torch.int64}
    results = {
        name: torch.empty(count if want else 0, dtype=kinds.get(name, torch.float32), device="cpu")
        for name, want in wanted.items()
    }
    addresses = {name: address(results[name]) for name, want in wanted.items() if want}
    sweep.finish(first, count, addresses, threads())
    return results


def wanted_results(config: CoreConfig) -> dict[str, bool]:
    """Which of a sweep's results a call returns or needs."""
    return {
        "loss": True,
        "nll": True,
        "lse": True,
        "lse_low": True,
        "entropy": config.statistics,
        "correct": config.statistics,
        "variance": config.variance,
        "hidden_variance": config.hidden_variance,
        "counts": config.residual == "entries",
    }
