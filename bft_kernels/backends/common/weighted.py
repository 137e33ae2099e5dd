"""The sums of a weighted loss, piece by piece: the loss, its gradients, weights and statistics.

A piece is a group of documents whose rows are taken together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bft_kernels.backends.common.gemm import Gemm
from bft_kernels.backends.common.rows import LabelledRows, by_position
from bft_kernels.problem import Problem, storage
from bft_kernels.results import BalancedLoss, Documents, WeightedLoss
from bft_kernels.settings import LOCAL_SCHEMES, Settings
from bft_kernels.weighting import Weighting, local_weighting, weighted_losses


class Piece(NamedTuple):
    """Rows ``first:stop``, taken together."""

    first: int
    stop: int
    # Boundaries of its documents, from 0, on the rows' device; None for weights local to a token.
    cu_seqlens: Tensor | None = None  # [s + 1]
    documents: slice = slice(0)  # its documents among those of RowDocuments


class RowDocuments(NamedTuple):
    """Documents over the rows that are computed; on a CPU only documents that have rows."""

    cu_seqlens: Tensor  # [s + 1] int64
    bounds: list[int]  # the same on the host
    which: Tensor | None  # [s] int64, which of the caller's documents they are; None: all of them


def in_rows(rows: LabelledRows, documents: Documents) -> RowDocuments:
    """The caller's documents over the rows that are computed."""
    if rows.masked:
        return RowDocuments(documents.cu_seqlens, documents.bounds, None)
    cu_seqlens = documents.cu_seqlens
    if rows.index is not None:
        cu_seqlens = torch.searchsorted(rows.index, cu_seqlens)
    filled = cu_seqlens.diff().nonzero().squeeze(1)
    cu_seqlens = torch.cat([cu_seqlens[:1], cu_seqlens[filled + 1]])
    return RowDocuments(cu_seqlens, cu_seqlens.tolist(), filled)


def pieces(rows: LabelledRows, documents: RowDocuments | None, chunk: int) -> Iterator[Piece]:
    """Pieces that fit the chunk. A document that does not fit is a piece by itself.

    Weights local to a token need no documents, so any rows can go together.
    """
    if documents is None:
        for first in range(0, rows.size, chunk):
            yield Piece(first, min(first + chunk, rows.size))
        return
    cu_seqlens, bounds, _ = documents
    begin = 0
    for place in range(1, len(bounds) + 1):
        last = place == len(bounds)
        if bounds[place - 1] > bounds[begin] and (last or bounds[place] - bounds[begin] > chunk):
            first, stop = bounds[begin], bounds[place - 1]
            own = cu_seqlens[begin:place] - first
            yield Piece(first, stop, own, slice(begin, place - 1))
            begin = place - 1


# nll [n], labelled [n] or None for all, cu_seqlens [s + 1], settings
WeightingFunction = Callable[[Tensor, Tensor | None, Tensor, Settings], Weighting]


class WeightedSums:
    """The running sums of one call, over the rows that are computed."""

    def __init__(
        self,
        problem: Problem,
        rows: LabelledRows,
        documents: Documents | None,  # the caller's
        results: dict[str, Tensor],  # [size], by row
        weigh: WeightingFunction,
    ) -> None:
        self.problem, self.rows = problem, rows
        self.documents = None if documents is None else in_rows(rows, documents)
        self.weigh = weigh
        acc, wanted, (_, vocabulary, width) = results["loss"].dtype, problem.wanted, problem.shape
        self.results = results
        zeros, empty = problem.hidden.new_zeros, problem.hidden.new_empty
        self.loss = zeros((), dtype=acc)
        self.grad_hidden = zeros(
            (rows.size if wanted.hidden else 0, width), dtype=storage(problem.hidden.dtype)
        )
        # It has the type of sums, and is [0, D] if it is not wanted. It is not filled, because the
        # first product is stored, not added.
        columns = problem.weight.shape[1]
        self.grad_weight = empty((vocabulary if wanted.weight else 0, columns), dtype=acc)
        self.grad_adapter: Tensor | None = None
        if problem.adapter is not None:
            rank = width - columns
            self.grad_adapter = empty((vocabulary if wanted.adapter else 0, rank), dtype=acc)
        self.added = False  # whether these two hold gradients
        self.grad_bias = zeros(vocabulary if wanted.bias else 0, dtype=acc)
        self.keeps = problem.settings.return_stats and documents is not None
        tokens = sequences = 0
        if self.keeps and documents is not None:
            tokens, sequences = rows.size, documents.cu_seqlens.numel() - 1
        self.weighting = (
            zeros(tokens, dtype=acc),  # token_weight
            zeros(tokens, dtype=acc),  # window_confidence
            zeros(sequences, dtype=acc),  # sequence_weight
            zeros(sequences, dtype=acc),  # sequence_confidence
        )

    def token_weights_of(self, piece: Piece) -> Tensor:
        """Token weight times sequence weight of the rows of a piece, once their nll is known."""
        nll = self.results["nll"][piece.first : piece.stop]
        labelled = self.rows.live(piece.first, piece.stop)
        if piece.cu_seqlens is None:
            return local_weighting(nll, labelled, self.problem.settings.scheme)
        weighting = self.weigh(
            nll, labelled if self.rows.masked else None, piece.cu_seqlens, self.problem.settings
        )
        if self.keeps:
            self._keep(piece, weighting)
        return weighting.weight

    def _keep(self, piece: Piece, weighting: Weighting) -> None:
        assert self.documents is not None
        which = self.documents.which
        where = piece.documents if which is None else which[piece.documents]
        for kept, made in zip(self.weighting[:2], weighting[1:3], strict=True):
            kept[piece.first : piece.stop] = made
        for kept, made in zip(self.weighting[2:], weighting[3:], strict=True):
            kept[where] = made

    def add_losses(self, piece: Piece, coefficient: Tensor) -> None:
        """Adds the weighted token losses of a piece."""
        losses = self.results["loss"][piece.first : piece.stop]
        self.loss += weighted_losses(losses, coefficient).sum()

    def add_gradients(
        self,
        first: int,
        stop: int,
        dy: Tensor,  # [stop - first, V], weighted and multiplied by scale
        operand: Tensor,  # [stop - first, D]
        gemm: Gemm,
        scale: Tensor | None,  # []
    ) -> None:
        """Adds the part of the rows ``first:stop`` to the gradients."""
        wanted, factor = self.problem.wanted, None if scale is None else 1 / scale
        if wanted.hidden:
            product = gemm.hidden_gradient(dy)
            self.grad_hidden[first:stop] = product if factor is None else product.mul_(factor)
        split = gemm.width  # where the adapter's part of a row begins
        if wanted.weight:
            own = operand if self.grad_adapter is None else operand[:, :split]
            gemm.weight_gradient(dy, own, self.grad_weight, factor, adds=self.added)
        if wanted.adapter and self.grad_adapter is not None:
            own = operand[:, split:]
            gemm.weight_gradient(dy, own, self.grad_adapter, factor, adds=self.added)
        self.added = True
        if wanted.bias:
            sums = dy.sum(dim=0, dtype=self.problem.acc_dtype)
            self.grad_bias += sums if factor is None else sums.mul_(factor)

    def result(self) -> WeightedLoss:
        """The results over all ``N`` rows."""
        if not self.added:  # there was no labelled row
            self.grad_weight.zero_()
        spread, problem, grad_adapter = self.rows.spread, self.problem, self.grad_adapter
        if problem.adapter is not None and grad_adapter is not None:
            grad_adapter = grad_adapter if self.added else grad_adapter.zero_()
            grad_adapter = grad_adapter.to(storage(problem.adapter.dtype))
        token_weight, window_confidence, *of_sequences = self.weighting
        return WeightedLoss(
            loss=self.loss,
            grad_hidden=spread(self.grad_hidden) if problem.wanted.hidden else self.grad_hidden,
            grad_weight=self.grad_weight.to(storage(problem.weight.dtype)),
            grad_bias=self.grad_bias,
            **by_position(problem, self.rows, self.results, ("nll", "lse", "entropy", "correct")),
            token_weight=spread(token_weight) if self.keeps else token_weight,
            window_confidence=spread(window_confidence) if self.keeps else window_confidence,
            sequence_weight=of_sequences[0],
            sequence_confidence=of_sequences[1],
            grad_adapter=grad_adapter,
        )


class SchemeFlags(NamedTuple):
    """What kernels that weigh are told of a scheme, and of what is divided by."""

    full_windows: bool
    geometric: bool
    confidence: bool  # the token weight is the confidence
    ratio: bool  # or the confidence over its window's; else 1
    flat: bool  # documents weigh 1
    by_sequence: bool
    counts: bool  # divides by what is counted

    @staticmethod
    def of(settings: Settings, normalize: str | None, num_items: Tensor | None) -> SchemeFlags:
        """With ``normalize=None`` coefficients are the weights."""
        scheme = str(settings.scheme)
        return SchemeFlags(
            full_windows=scheme.startswith("bft-v1"),
            geometric=scheme == "bft-v1-code",
            confidence=scheme in ("dft", "bft-v1", "bft-v1-code"),
            ratio=scheme == "bft",
            flat=scheme in LOCAL_SCHEMES,
            by_sequence=normalize == "sequence",
            counts=normalize is not None and num_items is None,
        )


class WeightingInputs(NamedTuple):
    """What kernels that weigh are given; each tensor is contiguous."""

    loss: Tensor  # [N] float32, 0 where ignored
    labelled: Tensor  # [N] bool
    cu_seqlens: Tensor  # [S + 1] over the N positions
    num_items: Tensor | None  # []
    settings: Settings
    flags: SchemeFlags

    def vectors(self, tile: int) -> dict[str, Tensor]:
        """What kernels fill in that take ``tile`` positions at a time."""
        count, sequences = self.loss.numel(), self.cu_seqlens.numel() - 1
        tiles = -(-count // tile)
        numbers = {"before": count + 1, "sequence": count, "ended": tiles}
        floats = {"sums": tiles, "sequence_weight": sequences, "sequence_confidence": sequences}
        for name in ("values", "lowest", "coefficient", "token_weight", "window_confidence"):
            floats[name] = count
        return {
            name: self.loss.new_empty(size, dtype=dtype)
            for sizes, dtype in ((numbers, torch.int32), (floats, torch.float32))
            for name, size in sizes.items()
        }


WeightingKernels = Callable[[WeightingInputs], dict[str, Tensor]]  # the vectors, filled in


def balanced_loss_by(
    run: WeightingKernels,
    loss: Tensor,  # [N] float32, 0 where ignored
    labelled: Tensor,  # [N] bool
    cu_seqlens: Tensor,  # [S + 1] over the N positions
    num_items: Tensor | None,  # []
    settings: Settings,
) -> BalancedLoss:
    """:func:`bft_kernels.weighting.balanced_loss` by a backend's kernels, in float32."""
    flags = SchemeFlags.of(settings, settings.normalize, num_items)
    given = loss.contiguous(), labelled.contiguous(), cu_seqlens.contiguous()
    made = run(WeightingInputs(*given, num_items, settings, flags))
    return BalancedLoss(made["sums"].sum(), *[made[name] for name in BalancedLoss._fields[1:]])


def weigh_by(
    run: WeightingKernels,
    nll: Tensor,  # [N]
    labelled: Tensor | None,  # [N] bool
    cu_seqlens: Tensor,  # [S + 1]
    settings: Settings,
) -> Weighting:
    """:func:`bft_kernels.weighting.balance` by a backend's kernels, in float32."""
    labelled = torch.ones_like(nll, dtype=torch.bool) if labelled is None else labelled
    flags = SchemeFlags.of(settings, None, None)
    given = nll.contiguous(), labelled.contiguous(), cu_seqlens.contiguous()
    made = run(WeightingInputs(*given, None, settings, flags))
    return Weighting(*[made[name] for name in BalancedLoss._fields[1:]])
