"""The engine of backends whose kernels run on a device: in chunks of logits, or in tiles.

If the byte budget has room for chunks of logits, the vendor's GEMM makes them in a buffer
(``chunked``). Otherwise kernels make tiles of logits that never leave them. Tiles take the least
memory and are computed again for the gradient. The host never waits for the device.
"""

from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from bft_kernels.backends.common import chunked
from bft_kernels.backends.common.chunked import takes_chunks
from bft_kernels.backends.common.csr import overflowed
from bft_kernels.backends.common.inputs import Inputs, rows_contiguous
from bft_kernels.backends.common.logit_rows import (
    ForwardRows,
    GradientRows,
    RowFunctions,
    forward_results,
    lists_of,
)
from bft_kernels.backends.common.rows import DeviceRows, KnownRows, packed, row_results
from bft_kernels.problem import Problem, storage
from bft_kernels.results import Documents, Forward, Gradients, Saved, Wanted, WeightedLoss
from bft_kernels.weighting import Weighting, local_weighting, weighted_losses


class Kernels(RowFunctions, Protocol):
    """What a backend supplies: a module of functions, none of which waits for the device."""

    # Whether weighted losses and frozen heads take tiles, too, where chunks have no room. Otherwise
    # they take chunks of fewer rows.
    TILES_GRADIENTS: bool

    def make_inputs(self, problem: Problem) -> Inputs:
        """The operands as the kernels below take them."""

    def written(self, dtype: torch.dtype, operand: torch.dtype) -> torch.dtype:
        """The type in which gradients of ``dtype`` are written if GEMMs take ``operand``."""

    def run_tiles(self, inputs: Inputs, results: dict[str, Tensor]) -> None:
        """The forward in tiles. It fills in the tensors of :func:`forward_results`."""

    def recompute(
        self, inputs: Inputs, known: KnownRows, seed: Tensor | None, into: Gradients, *, adds: bool
    ) -> None:
        """Writes or adds the gradients of the rows that ``inputs.rows`` lists, in tiles.

        Args:
            inputs: the inputs of the call, or of some of its rows.
            known: the known values of all rows.
            seed: ``[]``, for the sampled gradient; None for the exact one.
            into: the gradients, in the types of :meth:`written`; None where not wanted. Rows of
                ``dH`` are written; ``db`` is added to.
            adds: whether ``dW`` is added to; otherwise it is written.
        """

    def spmm(
        self, inputs: Inputs, known: KnownRows, saved: Saved, into: Gradients, *, adds: bool
    ) -> None:
        """``dH = S @ W`` and ``dW = S.T @ H`` of the listed entries, and the sums ``db``.

        Rows without a list do not change. For the arguments see :meth:`recompute`.
        """


def linear_nll(kernels: Kernels, problem: Problem) -> Forward:
    """Losses and statistics of every labelled row, and what ``problem.saved`` says is kept."""
    wants_unit = problem.saved == "unit"
    if _in_chunks(kernels, problem, gradients=wants_unit):
        rows = GradientRows if wants_unit else ForwardRows
        return chunked.linear_nll(partial(rows, kernels), problem)
    inputs, unit = kernels.make_inputs(problem), None
    results = forward_results(kernels, problem, with_values=False)
    kernels.run_tiles(inputs, results)
    if wants_unit:
        dtype = storage(problem.hidden.dtype)
        into = _places(kernels, problem, Wanted(True, False, False), dtype, dtype)
        known = _known(results, inputs.rows.labelled.float())
        kernels.recompute(inputs, known, None, into, adds=False)
        assert into.hidden is not None
        unit = into.hidden.to(dtype)
    return packed(problem, results, unit, lists_of(results))


def weighted_loss(
    kernels: Kernels,
    problem: Problem,
    token_scale: Tensor,  # [N], the factor of each token's weight; see `token_scales`
    documents: Documents | None,  # None for weights local to a token
) -> WeightedLoss:
    """The loss and its gradients for unit upstream gradient: 3G in chunks, 4G in tiles."""
    if _in_chunks(kernels, problem, gradients=True):
        return chunked.weighted_loss(
            partial(GradientRows, kernels), problem, token_scale, documents
        )
    inputs, settings = kernels.make_inputs(problem), problem.settings
    results = row_results(problem, problem.shape[0], filled=True)
    kernels.run_tiles(inputs, results)
    nll, labelled = results["nll"], inputs.rows.labelled
    made = Weighting(*[nll.new_empty(0) for _ in Weighting._fields])
    if documents is None:
        weighting = local_weighting(nll, labelled, settings.scheme)
    else:
        found = kernels.weigh(nll, labelled, documents.cu_seqlens, settings)
        weighting, made = found.weight, found if problem.statistics else made
    coefficient = inputs.rows.mask(token_scale.float() * weighting)
    types = storage(problem.hidden.dtype), storage(problem.weight.dtype)
    into = _places(kernels, problem, problem.wanted, *types)
    if any(problem.wanted):
        kernels.recompute(inputs, _known(results, coefficient), None, into, adds=False)

    def given(gradient: Tensor | None, dtype: torch.dtype, *shape: int) -> Tensor:
        return nll.new_empty(0, *shape, dtype=dtype) if gradient is None else gradient.to(dtype)

    width = problem.shape[2]
    return WeightedLoss(
        loss=weighted_losses(results["loss"], coefficient).sum(),
        grad_hidden=given(into.hidden, types[0], width),
        grad_weight=given(into.weight, types[1], width),
        grad_bias=given(into.bias, torch.float32),
        **{name: results[name] for name in ("nll", "lse", "entropy", "correct")},
        **dict(zip(Weighting._fields[1:], made[1:], strict=True)),
    )


def linear_nll_backward(
    kernels: Kernels,
    problem: Problem,
    grad: Tensor,  # [N]
    saved: Saved,
    grad_weight: Tensor | None = None,  # [V, D], added to in place; a new one if None
) -> Gradients:
    """The wanted gradients of ``sum(grad * loss)``."""
    inputs, wanted = kernels.make_inputs(problem), problem.wanted
    types = problem.hidden.dtype, problem.weight.dtype
    own = grad_weight if wanted.weight else None
    adds = (
        own is not None
        and kernels.written(own.dtype, problem.operand) == own.dtype
        and rows_contiguous(own) is own
    )
    new = wanted._replace(weight=wanted.weight and not adds)
    into = _places(kernels, problem, new, *types)
    if adds:
        into = into._replace(weight=own)
    known = KnownRows(saved.lse, saved.lse_low, saved.nll, inputs.rows.mask(grad.float()))
    if problem.settings.gradient == "sampled":
        _sampled(kernels, inputs, known, saved, into, adds)
    else:
        kernels.recompute(inputs, known, None, into, adds=adds)
    if into.hidden is not None:
        into = into._replace(hidden=into.hidden.to(types[0]))
    if into.weight is not None and not adds:
        made = into.weight.to(types[1])
        into = into._replace(weight=made if own is None else own.add_(made))
    return into


def _sampled(
    kernels: Kernels,
    inputs: Inputs,
    known: KnownRows,
    saved: Saved,
    into: Gradients,
    adds: bool,
) -> None:
    """The gradients of the listed entries, and then of the rows whose entries found no room.

    ``adds`` says that ``dW`` is added to from the start.
    """
    room = saved.csr_columns.numel()
    if room:
        kernels.spmm(inputs, known, saved, into, adds=adds)
    elif into.weight is not None and not adds:
        into.weight.zero_()
    rest = DeviceRows.chosen(overflowed(saved.csr_offsets, room))
    kernels.recompute(replace(inputs, rows=rest), known, inputs.call.seed, into, adds=True)


def _in_chunks(kernels: Kernels, problem: Problem, *, gradients: bool) -> bool:
    """Whether logits lie in a buffer. ``gradients`` says that they become gradients there."""
    whole = problem.settings.top_k or problem.adapter is not None
    if (gradients and not kernels.TILES_GRADIENTS) or whole:
        return True
    return takes_chunks(*problem.shape[:2], problem.buffer_bytes)


def _known(results: dict[str, Tensor], grad: Tensor) -> KnownRows:
    """The values that a recomputing backward needs: a forward's results and ``grad [N]``."""
    return KnownRows(results["lse"], results["lse_low"], results["nll"], grad)


def _places(
    kernels: Kernels,
    problem: Problem,
    wanted: Wanted,
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
) -> Gradients:
    """Tensors for gradients of these types. ``dH`` and ``db`` are zeros, ``dW`` is not filled."""
    (count, vocabulary, width), hidden = problem.shape, problem.hidden
    types = [kernels.written(dtype, problem.operand) for dtype in (hidden_dtype, weight_dtype)]
    return Gradients(
        hidden.new_zeros(count, width, dtype=types[0]) if wanted.hidden else None,
        hidden.new_empty(vocabulary, width, dtype=types[1]) if wanted.weight else None,
        hidden.new_zeros(vocabulary, dtype=torch.float32) if wanted.bias else None,
    )
