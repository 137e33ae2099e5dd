"""A weighted sum of token losses and its gradients: 3G where documents fit the budget, else 4G."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bft_kernels import _cpu
from bft_kernels.backends.cpu.backward import recompute, write_gradient
from bft_kernels.backends.cpu.native import (
    Block,
    KnownRows,
    Operands,
    finish,
    fresh,
    make_sweep,
    plan,
    sweep_all,
    threads,
    wanted_results,
)
from bft_kernels.backends.torch.matmul import Products
from bft_kernels.backends.torch.rows import LabelledRows
from bft_kernels.backends.torch.weighted import (
    WeightedEngine,
    piece_weights,
    pieces,
    run_pieces,
)
from bft_kernels.config import CoreConfig, Weighting, storage
from bft_kernels.plan import CpuPlan, plan_cpu_chunk
from bft_kernels.results import Wanted, WeightedLoss


def weighted_loss(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [N]
    share: Tensor,  # [N], what multiplies each token's weight: 1/(T_b B), token weights over n, ...
    cu_seqlens: Tensor | None,  # [S + 1] on the CPU; None for weights local to a token
    bias: Tensor | None,  # [V]
    config: CoreConfig,
    weighting: Weighting,
    wanted: Wanted,
) -> WeightedLoss:
    """The loss and its gradients for unit upstream gradient."""
    rows = LabelledRows(target, config.ignore_index)
    sizes = plan(hidden, weight, rows, config, products=3, trains_weight=wanted.weight)
    vocabulary, width = weight.shape
    chunk = plan_cpu_chunk(rows.count, vocabulary, width, config.max_buffer_bytes, sizes)
    if chunk:  # the chunk takes the budget; its own rows are copied with it
        sizes = replace(sizes, whole=False)
    engine = _Engine(hidden, weight, target, bias, rows, sizes, config, wanted)
    if chunk == 0:
        engine.two_passes(share, cu_seqlens, weighting)
    else:
        run_pieces(engine, share, cu_seqlens, weighting, chunk)
    return engine.result()


class _Engine(WeightedEngine):
    """Keeps a chunk's logits as contiguous blocks of the vocabulary.

    Each block is swept while it is in cache, and later turned into ``dy`` and multiplied twice
    while it is in cache again; nothing passes over whole rows of logits.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        rows: LabelledRows,
        sizes: CpuPlan,
        config: CoreConfig,
        wanted: Wanted,
    ) -> None:
        products = Products(weight, config.operand_dtype, torch.float32, sizes.columns)
        super().__init__(hidden, weight, target, bias, rows, products, 1, config, wanted)
        self.bias = None if self.bias is None else self.bias.contiguous()
        self.columns = sizes.columns
        self.operands = Operands(hidden, weight, rows, config, sizes)
        self.targets = rows.take(target, 0, rows.count).contiguous()
        self.lse_low = torch.zeros(rows.count)
        self.lse = torch.zeros(rows.count)
        self.blocks: list[Block] = []
        self.raw = False  # whether the blocks hold products that no sweep has made logits of
        self.added = False  # whether grad_weight holds anything

    def new_grad_weight(self) -> Tensor:
        """Not filled: the first product is stored, not added."""
        return fresh((self.weight.shape[0] if self.wanted.weight else 0, self.weight.shape[1]))

    def load(self, first: int, stop: int, *, gradient: bool, collect: bool = True) -> None:
        """Losses of rows ``first:stop``; their logits stay in the buffer."""
        vocabulary = self.weight.shape[0]
        self.blocks, self.raw = [], not collect
        if self.buffer is None or self.buffer.numel() < (stop - first) * vocabulary:
            self.buffer = None  # freed before its successor is made
            self.buffer = fresh(((stop - first) * vocabulary,))
        operand = self.operands.take(first, stop)
        sweep = self._sweep_of(first, stop) if collect else None
        place = 0
        for column in range(0, vocabulary, self.columns):
            last = min(column + self.columns, vocabulary)
            weight = self.operands.columns(column, last)
            size = (stop - first) * (last - column)
            out = self.buffer[place : place + size].view(stop - first, last - column)
            place += size
            torch.mm(operand, weight.T, out=out)
            # A widened block of weight is not kept: it is made again for the gradients.
            block = Block(0, column, out, operand, weight[:0])
            if sweep is not None:
                sweep.add(block.arguments(), threads())
            self.blocks.append(block)
        if sweep is not None:
            self._collect(sweep, first, stop)

    def _sweep_of(self, first: int, stop: int) -> _cpu.Sweep:
        targets = self.targets[first:stop]
        return make_sweep(
            targets, targets[:0], self.bias, None, None, 0, self.weight.shape[0], self.config
        )

    def _collect(self, sweep: _cpu.Sweep, first: int, stop: int) -> None:
        results = finish(sweep, 0, stop - first, wanted_results(self.config))
        part = slice(first, stop)
        self.nll[part], self.token_loss[part] = results["nll"], results["loss"]
        self.lse[part], self.lse_low[part] = results["lse"], results["lse_low"]
        self.collected.add(first, lse=results["lse"])
        if self.config.statistics:
            self.collected.add(first, entropy=results["entropy"], correct=results["correct"])

    def add_gradients(self, first: int, stop: int, coefficient: Tensor) -> None:
        """Adds the buffer's rows, weighted, to the loss and the gradients."""
        self.add_losses(first, stop, coefficient)
        known = KnownRows(
            targets=self.targets[first:stop],
            lse=self.lse[first:stop],
            lse_low=self.lse_low[first:stop],
            nll=self.nll[first:stop],
            upstream=coefficient.contiguous(),
        )
        vocabulary = self.weight.shape[0]
        grad_hidden = None
        for block in self.blocks:
            write_gradient(block, known, self.bias, self.config, vocabulary, raw=self.raw)
            columns = slice(block.first_column, block.stop_column)
            dy = block.logits
            if self.wanted.hidden:
                weight = self.operands.columns(block.first_column, block.stop_column)
                if grad_hidden is None:
                    grad_hidden = dy @ weight
                else:
                    grad_hidden.addmm_(dy, weight)
            if self.wanted.weight:
                self.grad_weight[columns].addmm_(dy.T, block.operand, beta=int(self.added))
            if self.wanted.bias:
                self.grad_bias[columns] += dy.sum(dim=0)
        if grad_hidden is not None:
            self.grad_hidden[first:stop] = grad_hidden
        self.added = True

    def two_passes(self, share: Tensor, cu_seqlens: Tensor | None, weighting: Weighting) -> None:
        """Losses of all rows first, then gradients from logits computed again (4G).

        With a budget of few whole rows this is faster than 3G: each chunk of rows has to pass over
        all of ``dW``, but this writes it once.
        """
        count = self.rows.count
        sweep = self._sweep_of(0, count)
        sweep_all(sweep, self.operands)
        self._collect(sweep, 0, count)
        coefficient = self.rows.take(share.float(), 0, count).clone()
        for bounds in pieces(self.rows, cu_seqlens, weighting, count):
            part = slice(bounds[0], bounds[-1])
            coefficient[part] *= piece_weights(self.nll, self.rows, bounds, weighting)
        self.add_losses(0, count, coefficient)
        grad_hidden, grad_bias = recompute(
            self.operands,
            KnownRows(self.targets, self.lse, self.lse_low, self.nll, coefficient),
            self.bias,
            self.config,
            self.wanted,
            self.grad_weight if self.wanted.weight else None,
        )
        self.added = True
        if grad_hidden is not None:
            self.grad_hidden = grad_hidden.to(storage(self.hidden.dtype))
        if grad_bias is not None:
            self.grad_bias = grad_bias

    def result(self) -> WeightedLoss:
        """The results over all ``N`` rows."""
        if self.wanted.weight and not self.added:
            self.grad_weight.zero_()
        return super().result()
