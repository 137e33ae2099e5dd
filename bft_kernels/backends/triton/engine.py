"""What the backend offers, from the kernels of the other modules."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bft_kernels.backends.common import chunked
from bft_kernels.backends.common.chunked import takes_chunks
from bft_kernels.backends.common.csr import overflowed
from bft_kernels.backends.common.gemm import squared_norms
from bft_kernels.backends.common.inputs import rows_contiguous
from bft_kernels.backends.common.rows import DeviceRows, KnownRows
from bft_kernels.backends.triton.forward import run_tiles
from bft_kernels.backends.triton.gather import gather_hidden, gather_weight
from bft_kernels.backends.triton.inputs import Inputs
from bft_kernels.backends.triton.recompute import recompute
from bft_kernels.backends.triton.rows import ForwardRows, GradientRows, forward_results, packed
from bft_kernels.backends.triton.scale import scale_
from bft_kernels.backends.triton.trial import try_out
from bft_kernels.backends.triton.weights import balanced_loss
from bft_kernels.problem import Problem, storage
from bft_kernels.results import Forward, Gradients, Saved

__all__ = [
    "balanced_loss",
    "linear_nll",
    "linear_nll_backward",
    "scale_",
    "try_out",
    "weighted_loss",
]


def linear_nll(problem: Problem) -> Forward:
    """Losses and statistics of every labelled row, and what ``problem.saved`` asks for."""
    if problem.saved == "unit":
        return chunked.linear_nll(GradientRows, problem)
    count, vocabulary, width = problem.shape
    if takes_chunks(count, vocabulary, problem.buffer_bytes):
        return chunked.linear_nll(ForwardRows, problem)
    inputs, results = Inputs.of(problem), forward_results(problem, with_values=False)
    norms = None
    if problem.hidden_variance:
        norms = squared_norms(inputs.weight, torch.float32, problem.buffer_bytes)
    run_tiles(inputs, problem.seed, norms, results)
    unit = problem.hidden.new_empty(0, width, dtype=storage(problem.hidden.dtype))
    return packed(problem, results, unit)


weighted_loss = partial(chunked.weighted_loss, GradientRows)


def linear_nll_backward(
    problem: Problem,
    grad: Tensor,  # [N]
    saved: Saved,
    grad_weight: Tensor | None = None,  # [V, D], added to in place; a new one if None
) -> Gradients:
    """Gradients of ``sum(grad * loss)`` by what is wanted."""
    hidden, weight, wanted = problem.hidden, problem.weight, problem.wanted
    inputs = Inputs.of(problem)
    grad = inputs.rows.mask(grad.float())
    grad_hidden: Tensor | None = None
    if wanted.hidden:
        grad_hidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    own = grad_weight if wanted.weight else None
    adds = own is not None and rows_contiguous(own) is own
    if wanted.weight and not adds:  # not there, or in a layout of its own; each row is written
        own = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    into = Gradients(
        grad_hidden,
        own,
        torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device)
        if wanted.bias
        else None,
    )
    known = KnownRows(saved.lse, saved.lse_low, saved.nll, grad)
    if problem.settings.gradient == "sampled":
        _sampled(inputs, known, saved, into, adds)
    else:
        recompute(inputs, known, None, into, adds=adds)
    if grad_weight is not None and own is not None and own is not grad_weight:
        return into._replace(weight=grad_weight.add_(own))
    return into


def _sampled(inputs: Inputs, known: KnownRows, saved: Saved, into: Gradients, adds: bool) -> None:
    """The gradients of the listed entries, to which the rows whose entries found no room are added.

    ``adds``: whether ``dW`` is added to from the start.
    """
    seed, wanted = inputs.call.seed, inputs.call.wanted
    assert seed is not None
    offsets, columns, values = saved.entry_offsets, saved.entry_columns, saved.entry_values
    wants_entries = wanted.weight or wanted.bias
    listed = gather_hidden(
        inputs, known, seed, offsets, columns, values, into.hidden, wants_entries
    )
    if wants_entries:
        gather_weight(inputs, listed, into, adds=adds)
    rest = DeviceRows.chosen(overflowed(offsets, columns.numel()))
    recompute(replace(inputs, rows=rest), known, seed, into, adds=True)
