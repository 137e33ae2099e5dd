"""The forward of the core op: row blocks of logits under the byte budget."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bft_kernels.backends.torch.matmul import Products, converts
from bft_kernels.backends.torch.rows import LabelledRows
from bft_kernels.backends.torch.sampling import row_keys, scaled_uniforms
from bft_kernels.backends.torch.sweep import (
    Scratch,
    Softmax,
    softmax_tile,
    token_loss,
    write_unit_gradient,
)
from bft_kernels.checks import check_capture
from bft_kernels.config import CoreConfig, accumulator, storage
from bft_kernels.plan import plan_rows
from bft_kernels.results import Forward


@dataclass
class Collected:
    """Results of the tiles so far, in row order: one vector a name, and the sampled entries."""

    count: int  # rows in all
    vectors: dict[str, Tensor] = field(default_factory=dict)
    entries: dict[str, list[Tensor]] = field(default_factory=dict)
    settled: int = 0  # pieces of entries that join_entries has dealt with

    def add(self, first: int, **values: Tensor) -> None:
        """Results of the rows from ``first`` on."""
        for name, value in values.items():
            if name not in self.vectors:
                self.vectors[name] = value.new_empty(self.count, *value.shape[1:])
            self.vectors[name][first : first + value.shape[0]] = value

    def add_entries(self, **values: Tensor) -> None:
        """Entries of the next rows; their number is not known before."""
        for name, value in values.items():
            self.entries.setdefault(name, []).append(value)

    def join_entries(self) -> None:
        """Joins the pieces since the last call, so that few small ones lie about (see Scratch)."""
        for parts in self.entries.values():
            parts[self.settled :] = [torch.cat(parts[self.settled :])]
        self.settled += bool(self.entries)

    def get(self, name: str, like: Tensor) -> Tensor:
        """All values of ``name``; an empty tensor like ``like [0, ...]`` if there are none."""
        if name in self.entries:
            return torch.cat(self.entries[name])
        return self.vectors.get(name, torch.empty_like(like))


def products_and_plan(
    hidden: Tensor, weight: Tensor, rows: int, config: CoreConfig, scratch: int
) -> tuple[Products, int, int]:
    """The products, rows of a chunk and rows of a tile for passes over whole rows."""
    wide = accumulator(hidden.dtype)
    vocabulary, width = weight.shape
    plan = plan_rows(
        rows,
        vocabulary,
        width,
        wide.itemsize,
        config.max_buffer_bytes,
        widen=converts(weight, config.operand_dtype, wide),
        scratch=scratch,
    )
    products = Products(weight, config.operand_dtype, wide, plan.weight_rows)
    return products, plan.chunk_rows, plan.tile_rows


def linear_nll(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [N]
    bias: Tensor | None,  # [V]
    seed: Tensor | None,  # []
    config: CoreConfig,
) -> Forward:
    """Losses and statistics of every labelled row, and the residual that ``config`` asks for."""
    if config.residual == "entries":  # as many as are kept, in the backward too
        check_capture(
            hidden.device,
            "gradient: got 'sampled' with backend='torch'",
            "'exact', or 'triton' or 'cuda': the host reads how many entries are kept",
        )
    wide = accumulator(hidden.dtype)
    rows = LabelledRows(target, config.ignore_index)
    sampled = config.residual == "entries" or config.variance
    scratch = 5 if sampled else 2 + (config.softcap is not None)
    slope = config.softcap is not None and (config.residual == "unit" or sampled)
    products, chunk, tile_rows = products_and_plan(hidden, weight, rows.count, config, scratch)
    norms = squared_norms(weight, wide, config.max_buffer_bytes) if config.hidden_variance else None
    bias = None if bias is None else bias.to(wide)
    buffer = hidden.new_empty(min(chunk, rows.count), weight.shape[0], dtype=wide)
    tiles = Scratch.make(buffer, tile_rows, slope=slope, sample=config.residual == "entries")
    out = Collected(rows.count)
    for first in range(0, rows.count, chunk):
        stop = min(first + chunk, rows.count)
        y = products.logits(products.rows(rows.take(hidden, first, stop)), buffer[: stop - first])
        targets = rows.take(target, first, stop)
        for a in range(0, stop - first, tile_rows):
            b = min(a + tile_rows, stop - first)
            tile = softmax_tile(y[a:b], targets[a:b], bias, config, tiles)
            nll = tile.nll
            out.add(first + a, nll=nll, loss=token_loss(tile, nll, config))
            collect_statistics(out, first + a, tile, config)
            if config.residual == "unit":
                write_unit_gradient(tile, nll, config)
            elif config.residual == "entries":
                assert seed is not None
                assert tiles.draws is not None
                live = rows.take(rows.labelled, first + a, first + b)
                keys = row_keys(seed, rows.positions(first + a, first + b))
                kept = sample_tile(out, tile, nll, keys, live, tiles.draws[:, : b - a], config)
                out.add(first + a, counts=kept)
            if config.variance or config.hidden_variance:
                certify_tile(out, first + a, tile, norms, config)
        out.join_entries()
        if config.residual == "unit":
            out.add(first, unit=products.hidden_gradient(y).to(storage(hidden.dtype)))
    return pack(out, rows, hidden, config)


def collect_statistics(out: Collected, first: int, tile: Softmax, config: CoreConfig) -> None:
    """What a tile, whose rows begin at ``first``, tells beyond its losses."""
    out.add(first, lse=tile.lse, lse_low=tile.lse_low)
    if config.statistics:
        out.add(first, entropy=tile.entropy, correct=tile.argmax == tile.target)


def sample_tile(
    out: Collected,
    tile: Softmax,
    nll: Tensor,  # [n]
    keys: tuple[Tensor, Tensor],  # of row_keys
    live: Tensor,  # [n] bool, False for rows that carry no label
    scratch: Tensor,  # [2, n, V] int32
    config: CoreConfig,
) -> Tensor:  # [n], entries kept in each row
    """Draws the kept entries of a tile of complete rows and their values of ``dy``."""
    p = tile.probability
    columns = torch.arange(p.shape[1], dtype=torch.int32, device=p.device)
    kept = scaled_uniforms(*keys, columns, config.eps, scratch) < p
    kept.scatter_(1, tile.target[:, None], True).logical_and_(live[:, None])
    row, column = kept.nonzero(as_tuple=True)
    value = torch.where(
        column == tile.target[row], torch.expm1(-nll)[row], p[row, column].clamp_min_(config.eps)
    )
    value /= config.temperature
    if tile.slope is not None:
        value *= tile.slope[row, column]
    out.add_entries(entry_columns=column.to(torch.int32), entry_values=value)
    return kept.sum(dim=1)


def certify_tile(
    out: Collected, first: int, tile: Softmax, norms: Tensor | None, config: CoreConfig
) -> None:
    """``sum_{v != target} p (eps - p)^+ slope^2`` of each row, and with ``|W_v|^2`` if asked."""
    p = tile.probability
    term = torch.sub(config.eps, p, out=tile.shifted).clamp_(min=0).mul_(p)
    if tile.slope is not None:
        term.mul_(tile.slope).mul_(tile.slope)
    term.scatter_(1, tile.target[:, None], 0.0)
    out.add(first, variance=term.sum(dim=1) / config.temperature**2)
    if norms is not None:
        out.add(first, hidden_variance=term @ norms / config.temperature**2)


def squared_norms(weight: Tensor, wide: torch.dtype, budget: int) -> Tensor:
    """``|W_v|^2`` of each row, ``[V]`` in ``wide``."""
    block = max(1, budget // (2 * weight.shape[1] * wide.itemsize))
    norms = weight.new_empty(weight.shape[0], dtype=wide)
    for part, out in zip(weight.split(block), norms.split(block), strict=True):
        torch.sum(part.to(wide).square(), dim=1, out=out)
    return norms


def pack(out: Collected, rows: LabelledRows, hidden: Tensor, config: CoreConfig) -> Forward:
    """The collected tiles as tensors over all ``N`` rows."""
    wide = hidden.new_empty(0, dtype=accumulator(hidden.dtype))
    empty = {
        "correct": wide.new_empty(0, dtype=torch.bool),
        "counts": wide.new_empty(0, dtype=torch.int64),
        "entry_columns": wide.new_empty(0, dtype=torch.int32),
        "unit": hidden.new_empty(0, hidden.shape[1], dtype=storage(hidden.dtype)),
    }

    def full(name: str, wanted: bool) -> Tensor:
        like = empty.get(name, wide)
        if not wanted:
            return torch.empty_like(like)
        values = out.get(name, like)
        return rows.spread(values)

    sampled = config.residual == "entries"
    ends = full("counts", sampled).cumsum(0)
    return Forward(
        loss=full("loss", True),
        nll=full("nll", True),
        lse=full("lse", True),
        lse_low=full("lse_low", config.residual == "recompute"),
        entropy=full("entropy", config.statistics),
        correct=full("correct", config.statistics),
        variance=full("variance", config.variance),
        hidden_variance=full("hidden_variance", config.hidden_variance),
        unit=full("unit", config.residual == "unit"),
        entry_offsets=torch.nn.functional.pad(ends, (1, 0)) if sampled else ends,
        entry_columns=out.get("entry_columns", empty["entry_columns"]),
        entry_values=out.get("entry_values", wide),
    )
