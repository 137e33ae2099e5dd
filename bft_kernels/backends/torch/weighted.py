"""A weighted sum of token losses and its gradients, made in the pass that makes the logits (3G).

Documents whose labelled tokens fit one block of logits get their weights while those logits are
still there. A longer document takes two passes: losses first, then gradients from new logits (4G).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bft_kernels.backends.torch.forward import Collected, collect_statistics, products_and_plan
from bft_kernels.backends.torch.matmul import Products, gemm_dtype, scale_for
from bft_kernels.backends.torch.rows import LabelledRows
from bft_kernels.backends.torch.sweep import (
    Scratch,
    softmax_tile,
    token_loss,
    write_unit_gradient,
)
from bft_kernels.config import CoreConfig, Weighting, accumulator, storage
from bft_kernels.results import Documents, Wanted, WeightedLoss
from bft_kernels.weighting import balance, labelled_layout, local_weights


def weighted_loss(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [N]
    share: Tensor,  # [N], what multiplies each token's weight: 1/(T_b B), token weights over n, ...
    documents: Documents | None,  # None for weights local to a token
    bias: Tensor | None,  # [V]
    config: CoreConfig,
    weighting: Weighting,
    wanted: Wanted,
) -> WeightedLoss:
    """The loss and its gradients for unit upstream gradient."""
    rows = LabelledRows(target, config.ignore_index)
    scratch = 2 + (config.softcap is not None)
    products, chunk, tile_rows = products_and_plan(hidden, weight, rows.count, config, scratch)
    engine = WeightedEngine(hidden, weight, target, bias, rows, products, tile_rows, config, wanted)
    run_pieces(engine, share, documents, weighting, chunk)
    return engine.result()


def run_pieces(
    engine: WeightedEngine,
    share: Tensor,
    documents: Documents | None,
    weighting: Weighting,
    chunk: int,
) -> None:
    """Takes all rows through ``engine``, at most ``chunk`` rows of logits at a time."""
    rows = engine.rows
    share = rows.take(share.to(engine.wide), 0, rows.count)
    for piece in pieces(rows, documents, chunk):
        first, stop = piece.first, piece.stop
        if stop - first <= chunk:
            engine.load(first, stop, gradient=True)
            coefficient = share[first:stop] * engine.weights(piece, weighting)
            engine.add_gradients(first, stop, coefficient)
            continue
        parts = [(a, min(a + chunk, stop)) for a in range(first, stop, chunk)]
        for a, b in parts:
            engine.load(a, b, gradient=False)
        coefficient = share[first:stop] * engine.weights(piece, weighting)
        for a, b in parts:
            engine.load(a, b, gradient=True, collect=False)
            engine.add_gradients(a, b, coefficient[a - first : b - first])


class Piece(NamedTuple):
    """Rows ``first:stop``, taken together."""

    first: int
    stop: int
    cu_seqlens: Tensor | None  # [s + 1] from 0, beside the rows; None for weights local to a token


class WeightedSums:
    """The token losses, statistics and running gradients of one call."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        rows: LabelledRows,
        config: CoreConfig,
        wanted: Wanted,
    ) -> None:
        self.hidden, self.weight, self.target, self.rows = hidden, weight, target, rows
        self.config, self.wanted = config, wanted
        self.wide = accumulator(hidden.dtype)
        self.bias = None if bias is None else bias.to(self.wide)
        self.collected = Collected(rows.count)
        self.nll = hidden.new_zeros(rows.count, dtype=self.wide)
        self.token_loss = hidden.new_zeros(rows.count, dtype=self.wide)
        self.loss = hidden.new_zeros((), dtype=self.wide)
        vocabulary, width = weight.shape
        self.grad_hidden = hidden.new_zeros(
            (rows.count if wanted.hidden else 0, width), dtype=storage(hidden.dtype)
        )
        # In the accumulator's type; [0, D] if it is not wanted. Not filled: the first product is
        # stored, not added.
        shape = (vocabulary if wanted.weight else 0, width)
        self.grad_weight = weight.new_empty(shape, dtype=self.wide)
        self.added = False  # whether grad_weight holds gradients
        self.grad_bias = weight.new_zeros(vocabulary if wanted.bias else 0, dtype=self.wide)

    def weights(self, piece: Piece, weighting: Weighting) -> Tensor:
        """Token weight times sequence weight of the rows of one piece."""
        nll = self.nll[piece.first : piece.stop]
        labelled = self.rows.take(self.rows.labelled, piece.first, piece.stop)
        if piece.cu_seqlens is None:
            return local_weights(nll, labelled, weighting.scheme)
        return self.joint_weights(nll, labelled, piece.cu_seqlens, weighting)

    def joint_weights(
        self, nll: Tensor, labelled: Tensor, cu_seqlens: Tensor, weighting: Weighting
    ) -> Tensor:
        """The same, of a scheme that looks at documents."""
        layout = labelled_layout(labelled, cu_seqlens)
        settings = (weighting.scheme, weighting.window, weighting.gamma, weighting.floor)
        return balance(nll, layout, *settings).weight

    def add_losses(self, first: int, stop: int, coefficient: Tensor) -> None:
        """Adds the weighted token losses; where a weight is 0 an infinite one counts nothing."""
        losses = torch.where(coefficient != 0, self.token_loss[first:stop], 0)
        self.loss += (coefficient * losses).sum()

    def result(self) -> WeightedLoss:
        """The results over all ``N`` rows."""
        if not self.added:  # there was no labelled row
            self.grad_weight.zero_()

        def full(name: str, dtype: torch.dtype) -> Tensor:
            values = self.collected.get(name, self.hidden.new_empty(0, dtype=dtype))
            wanted = self.config.statistics or name == "lse"
            return self.rows.spread(values) if wanted else values

        wide = self.wide
        return WeightedLoss(
            loss=self.loss,
            grad_hidden=self.rows.spread(self.grad_hidden)
            if self.wanted.hidden
            else self.grad_hidden,
            grad_weight=self.grad_weight.to(storage(self.weight.dtype)),
            grad_bias=self.grad_bias,
            nll=self.rows.spread(self.nll),
            lse=full("lse", wide),
            entropy=full("entropy", wide),
            correct=full("correct", torch.bool),
        )


class WeightedEngine(WeightedSums):
    """Adds to the sums chunk by chunk: the logits of whole rows are in a buffer."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        rows: LabelledRows,
        products: Products,
        tile_rows: int,
        config: CoreConfig,
        wanted: Wanted,
    ) -> None:
        super().__init__(hidden, weight, target, bias, rows, config, wanted)
        self.products, self.tile_rows = products, tile_rows
        self.buffer: Tensor | None = None
        self.operand: Tensor | None = None
        self.scratch: Scratch | None = None

    def load(self, first: int, stop: int, *, gradient: bool, collect: bool = True) -> None:
        """Losses of rows ``first:stop``; with ``gradient``, what :meth:`add_gradients` needs."""
        self._logits(first, stop)
        self._sweep(first, stop, gradient=gradient, collect=collect)

    def _logits(self, first: int, stop: int) -> None:
        """Raw logits of rows ``first:stop`` into the buffer."""
        if self.buffer is None or self.buffer.shape[0] < stop - first:
            self.buffer = None  # freed before its successor is made
            self.buffer = self.hidden.new_empty(stop - first, self.weight.shape[0], dtype=self.wide)
        self.operand = self.products.rows(self.rows.take(self.hidden, first, stop))
        self.products.logits(self.operand, self.buffer[: stop - first])

    def _sweep(self, first: int, stop: int, *, gradient: bool, collect: bool) -> None:
        """Token losses of the buffer's rows; with ``gradient`` their ``dy`` replaces the logits."""
        assert self.buffer is not None
        if self.scratch is None:
            softcap = self.config.softcap is not None
            self.scratch = Scratch.make(self.buffer, self.tile_rows, slope=softcap)
        targets = self.rows.take(self.target, first, stop)
        for a in range(0, stop - first, self.tile_rows):
            b = min(a + self.tile_rows, stop - first)
            tile = softmax_tile(
                self.buffer[a:b], targets[a:b], self.bias, self.config, self.scratch
            )
            nll = tile.nll
            if collect:
                self.nll[first + a : first + b] = nll
                self.token_loss[first + a : first + b] = token_loss(tile, nll, self.config)
                collect_statistics(self.collected, first + a, tile, self.config)
            if gradient:
                write_unit_gradient(tile, nll, self.config)

    def add_gradients(self, first: int, stop: int, coefficient: Tensor) -> None:
        """Adds the buffer's rows, weighted, to the loss and the gradients."""
        self.add_losses(first, stop, coefficient)
        scale = self._scale(first, stop, coefficient)
        if scale is not None:
            coefficient = coefficient * scale
        self._add_products(first, stop, self._weighted_dy(first, stop, coefficient), scale)

    def _weighted_dy(self, first: int, stop: int, coefficient: Tensor) -> Tensor:
        """``coefficient * dy`` of the buffer's rows ``[stop - first, V]``, in their place."""
        assert self.buffer is not None
        return self.buffer[: stop - first].mul_(coefficient[:, None])

    def _scale(self, first: int, stop: int, coefficient: Tensor) -> Tensor | None:
        """What a float16 ``dy`` is multiplied by; see :func:`scale_for`."""
        operand = gemm_dtype(self.products.operand, self.wide, self.weight.device.type)
        if operand != torch.float16:
            return None
        lse = self.collected.vectors["lse"][first:stop]
        return scale_for(coefficient, lse, self.config.temperature, self.config.z_loss)

    def _add_products(self, first: int, stop: int, dy: Tensor, scale: Tensor | None) -> None:
        """Adds what ``dy [stop - first, V]``, weighted and scaled, gives to the gradients."""
        assert self.operand is not None
        factor = None if scale is None else 1 / scale
        if self.wanted.hidden:
            product = self.products.hidden_gradient(dy)
            self.grad_hidden[first:stop] = product if factor is None else product.mul_(factor)
        if self.wanted.weight:
            self.products.weight_gradient(
                dy, self.operand, self.grad_weight, factor, adds=self.added
            )
            self.added = True
        if self.wanted.bias:
            sums = dy.sum(dim=0, dtype=self.wide)
            self.grad_bias += sums if factor is None else sums.mul_(factor)


def in_rows(rows: LabelledRows, documents: Documents) -> Documents:
    """``documents`` over the rows that are computed, without those that have none on a CPU."""
    if rows.masked:
        return documents
    cu_seqlens = documents.cu_seqlens
    if rows.index is not None:
        cu_seqlens = torch.searchsorted(rows.index, cu_seqlens)
    cu_seqlens = cu_seqlens.unique_consecutive()
    return Documents(cu_seqlens, cu_seqlens.tolist())


def pieces(rows: LabelledRows, documents: Documents | None, chunk: int) -> Iterator[Piece]:
    """Documents that are taken together; a piece fits the chunk unless one does not.

    Weights local to a token need no documents: any rows go together.
    """
    if documents is None:
        for first in range(0, rows.count, chunk):
            yield Piece(first, min(first + chunk, rows.count), None)
        return
    cu_seqlens, bounds = in_rows(rows, documents)
    begin = 0
    for place in range(1, len(bounds) + 1):
        last = place == len(bounds)
        if bounds[place - 1] > bounds[begin] and (last or bounds[place] - bounds[begin] > chunk):
            first, stop = bounds[begin], bounds[place - 1]
            yield Piece(first, stop, cu_seqlens[begin:place] - first)
            begin = place - 1
