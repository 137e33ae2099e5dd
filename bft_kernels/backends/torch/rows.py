"""The chunked engine's passes over rows of logits, in plain PyTorch, tile by tile."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bft_kernels.backends.common.chunked import RowPlan, chunk_plan
from bft_kernels.backends.common.gemm import squared_norms
from bft_kernels.backends.common.rows import LabelledRows, packed, row_results
from bft_kernels.backends.torch.sampling import row_keys, scaled_uniforms
from bft_kernels.backends.torch.softmax import (
    Scratch,
    Softmax,
    softmax_tile,
    token_loss,
    write_unit_gradient,
)
from bft_kernels.checks import check_capture
from bft_kernels.problem import Problem
from bft_kernels.results import Forward
from bft_kernels.weighting import balance

# Elementwise passes run over tiles of about this many logits. On a CPU a tile and its scratch stay
# in the second-level cache or near it between passes. On a GPU a tile fills the device, and many
# rows share the cost of its 35 launches.
TILE_ELEMENTS, DEVICE_TILE_ELEMENTS = 2**18, 2**25


class TorchRows:
    """See :class:`bft_kernels.backends.common.chunked.RowKernels`."""

    weigh = staticmethod(balance)

    def __init__(self, problem: Problem) -> None:
        self.problem, self.settings = problem, problem.settings
        self.sampled = problem.saved == "entries"
        if self.sampled:  # the host must know how many entries are kept, in the backward too
            check_capture(
                problem.hidden.device,
                "gradient: got 'sampled' with backend='torch'",
                "'exact', or 'triton' or 'cuda': the host reads how many entries are kept",
            )
        self.rows = LabelledRows(problem.target, self.settings.ignore_index)
        acc, capped = problem.acc_dtype, self.settings.softcap is not None
        draws = self.sampled or problem.variance
        size, on_cpu = self.rows.size, problem.hidden.device.type == "cpu"
        scratch = 5 if draws else 2 + capped
        tiles = Tiles.of(size, problem.shape[1], acc.itemsize, scratch, on_cpu=on_cpu)
        self.plan = chunk_plan(problem, size, reserve=tiles.reserve)
        self.tile_rows = tiles.rows(self.plan)
        self.bias = None if problem.bias is None else problem.bias.to(acc)
        self.targets = self.rows.take(problem.target, 0, self.rows.size)
        self.results = row_results(problem, self.rows.size)
        self.norms: Tensor | None = None
        if problem.hidden_variance:
            self.norms = squared_norms(problem.weight, acc, problem.buffer_bytes)
        self.scratch: Scratch | None = None
        self.slopes = capped and (draws or problem.saved in ("unit", "recompute"))
        self.entries = Entries()

    def forward(self, logits: Tensor, first: int, *, gradient: bool, collect: bool = True) -> None:
        """Losses, statistics, sample and certificate; with ``gradient`` also ``dy``."""
        if self.scratch is None:
            self.scratch = Scratch.make(
                logits, self.tile_rows, slope=self.slopes, sample=self.sampled
            )
        for a in range(0, logits.shape[0], self.tile_rows):
            y = logits[a : a + self.tile_rows]
            begin, stop = first + a, first + a + y.shape[0]
            tile = softmax_tile(y, self.targets[begin:stop], self.bias, self.settings, self.scratch)
            nll = tile.nll
            if collect:
                self._collect(begin, stop, tile, nll)
            if gradient:
                write_unit_gradient(tile, nll, self.settings)
        self.entries.join()

    def _collect(self, first: int, stop: int, tile: Softmax, nll: Tensor) -> None:
        """Fills in the results of a tile of rows ``first:stop``. This may overwrite the logits."""
        results, part = self.results, slice(first, stop)
        results["nll"][part] = nll
        results["loss"][part] = token_loss(tile, nll, self.settings)
        results["lse"][part] = tile.lse
        if results["lse_low"].numel():
            results["lse_low"][part] = tile.lse_low
        if self.problem.statistics:
            results["entropy"][part] = tile.entropy
            results["correct"][part] = tile.argmax == tile.target
        if self.sampled:
            self._sample(first, stop, tile, nll)
        if self.problem.variance:
            self._certify(part, tile)

    def _sample(self, first: int, stop: int, tile: Softmax, nll: Tensor) -> None:
        """Draws the kept entries of a tile and their values of ``dy``."""
        assert self.problem.seed is not None
        assert self.scratch is not None
        assert self.scratch.draws is not None
        keys = row_keys(self.problem.seed, self.rows.positions(first, stop))
        p = tile.probability
        columns = torch.arange(p.shape[1], dtype=torch.int32, device=p.device)
        draws = scaled_uniforms(
            *keys, columns, self.settings.eps, self.scratch.draws[:, : p.shape[0]]
        )
        kept = (draws < p).scatter_(1, tile.target[:, None], True)
        live = self.rows.live(first, stop)
        row, column = kept.logical_and_(live[:, None]).nonzero(as_tuple=True)
        value = torch.where(
            column == tile.target[row],
            torch.expm1(-nll)[row],
            p[row, column].clamp_min_(self.settings.eps),
        )
        value /= self.settings.temperature
        if tile.slope is not None:
            value *= tile.slope[row, column]
        self.entries.add(kept.sum(dim=1), column.to(torch.int32), value)

    def _certify(self, part: slice, tile: Softmax) -> None:
        """``sum_{v != target} p (eps - p)^+ slope^2``, and if wanted the same with ``|W_v|^2``."""
        p = tile.probability
        term = torch.sub(self.settings.eps, p, out=tile.shifted).clamp_(min=0).mul_(p)
        if tile.slope is not None:
            term.mul_(tile.slope).mul_(tile.slope)
        term.scatter_(1, tile.target[:, None], 0.0)
        square = self.settings.temperature**2
        self.results["variance"][part] = term.sum(dim=1) / square
        if self.norms is not None:
            self.results["hidden_variance"][part] = term @ self.norms / square

    def gradient(self, logits: Tensor, first: int, coefficient: Tensor | None) -> Tensor:
        """The gradient that :meth:`forward` left in place of the logits, weighted."""
        return logits if coefficient is None else logits.mul_(coefficient[:, None])

    def packed(self, unit: Tensor | None) -> Forward:
        """The results over all ``N`` rows."""
        lists = self.entries.packed(self.problem, self.rows) if self.sampled else None
        return packed(self.problem, self.results, unit, lists, self.rows)


@dataclass(frozen=True)
class Tiles:
    """Tiles of whole rows of a chunk. Their temporaries come out of the same budget."""

    most: int  # rows of a tile
    row_bytes: int  # of a row's temporaries

    @staticmethod
    def of(rows: int, vocabulary: int, itemsize: int, scratch: int, *, on_cpu: bool) -> Tiles:
        """For ``scratch`` temporaries, each as large as the tile."""
        elements = TILE_ELEMENTS if on_cpu else DEVICE_TILE_ELEMENTS
        return Tiles(max(1, min(rows, elements // vocabulary)), scratch * vocabulary * itemsize)

    def reserve(self, budget: int) -> int:
        """Bytes of the temporaries: half the budget at most, or those of one row."""
        rows = self.most
        while rows > 1 and rows * self.row_bytes > budget // 2:
            rows //= 2
        return rows * self.row_bytes

    def rows(self, plan: RowPlan) -> int:
        """Rows of a tile, once the chunks are known."""
        return min(plan.chunk_rows, plan.reserved // self.row_bytes)


class Entries:
    """The sampled entries, tile by tile. Their number is not known beforehand."""

    def __init__(self) -> None:
        self.parts: tuple[list[Tensor], ...] = ([], [], [])  # counts by row, columns, values
        self.joined = 0  # parts that are joined

    def add(self, *parts: Tensor) -> None:
        """Adds the counts, columns and values of the next rows."""
        for known, part in zip(self.parts, parts, strict=True):
            known.append(part)

    def join(self) -> None:
        """Joins the parts since the last call, so that few small ones remain (see Scratch)."""
        if len(self.parts[0]) == self.joined:
            return
        for known in self.parts:
            known[self.joined :] = [torch.cat(known[self.joined :])]
        self.joined += 1

    def packed(self, problem: Problem, rows: LabelledRows) -> dict[str, Tensor]:
        """The lists, by the names of ``Forward``."""
        hidden = problem.hidden
        counts, columns, values = (
            torch.cat([hidden.new_empty(0, dtype=dtype), *known])
            for known, dtype in zip(
                self.parts, (torch.int64, torch.int32, problem.acc_dtype), strict=True
            )
        )
        offsets = torch.nn.functional.pad(rows.spread(counts).cumsum(0), (1, 0))
        return {"csr_offsets": offsets, "csr_columns": columns, "csr_values": values}
