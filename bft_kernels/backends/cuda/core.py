"""The core op: its forward and its backward, from the kernels of the other modules."""

from __future__ import annotations

import torch
from torch import Tensor

from bft_kernels.backends.common.csr import capacity_for
from bft_kernels.backends.common.inputs import rows_contiguous
from bft_kernels.backends.common.rows import KnownRows
from bft_kernels.backends.cuda.certificate import certify
from bft_kernels.backends.cuda.forward import run_tiles
from bft_kernels.backends.cuda.inputs import Inputs
from bft_kernels.backends.cuda.native import _cuda
from bft_kernels.backends.cuda.recompute import recompute
from bft_kernels.backends.cuda.sampled import list_entries, sampled_gradients
from bft_kernels.problem import Problem, storage
from bft_kernels.results import Forward, Gradients, Saved, Wanted


def linear_nll(problem: Problem) -> Forward:
    """Losses and statistics of every labelled row, and what ``problem.saved`` asks for."""
    inputs, hidden, call = Inputs.of(problem), problem.hidden, problem
    count, _, width = inputs.shape
    device = hidden.device
    results = row_results(inputs)
    offsets = torch.empty(0, dtype=torch.int64, device=device)
    columns = torch.empty(0, dtype=torch.int32, device=device)
    if call.saved == "entries":
        assert problem.seed is not None
        room = capacity_for(count, problem.shape[1], call.settings.eps)
        if width > _cuda.MAX_GATHERED:  # rows without room are computed again
            room = 0
        offsets, columns = list_entries(inputs, problem.seed, results, room)
    else:
        run_tiles(inputs, results, 0, count)
    variance, hidden_variance = certify(inputs, results["lse"])
    unit = torch.empty(0, width, dtype=storage(hidden.dtype), device=device)
    if call.saved == "unit":
        ones = inputs.rows.labelled.float()
        into = gradient_places(inputs, Wanted(True, False, False), storage(hidden.dtype), None)
        recompute(inputs, row_values(results, ones), None, into, adds=False)
        assert into.hidden is not None
        unit = into.hidden.to(unit.dtype)
    if call.saved != "recompute":
        results["lse_low"] = torch.empty(0, dtype=torch.float32, device=device)
    return Forward(
        **results,
        variance=variance,
        hidden_variance=hidden_variance,
        unit=unit,
        entry_offsets=offsets,
        entry_columns=columns,
        entry_values=torch.empty(0, dtype=torch.float32, device=device),
    )


def row_results(inputs: Inputs) -> dict[str, Tensor]:
    """Where the forward's results by row go: zeros ``[N]``, or ``[0]`` where not wanted."""
    call, count, device = inputs.call, inputs.shape[0], inputs.hidden.device

    def per_row(wanted: bool, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(count if wanted else 0, dtype=dtype, device=device)

    return {
        "loss": per_row(True),
        "nll": per_row(True),
        "lse": per_row(True),
        "lse_low": per_row(call.saved in ("recompute", "unit")),
        "entropy": per_row(call.statistics),
        "correct": per_row(call.statistics, torch.bool),
    }


def row_values(results: dict[str, Tensor], grad: Tensor) -> KnownRows:
    """What the backward needs of a forward's results, with ``grad [N]``."""
    return KnownRows(results["lse"], results["lse_low"], results["nll"], grad)


def gradient_places(
    inputs: Inputs, wanted: Wanted, hidden_dtype: torch.dtype, weight_dtype: torch.dtype | None
) -> Gradients:
    """Where gradients go, in a type that kernels write: the operands', or float32 for any other.

    ``dH`` and ``db`` are zeros, ``dW`` is not filled.
    """
    count, vocabulary, width = inputs.shape
    device, operand = inputs.hidden.device, inputs.call.operand

    def written(dtype: torch.dtype | None) -> torch.dtype:
        return operand if dtype == operand else torch.float32

    into = Gradients(None, None, None)
    if wanted.hidden:
        into = into._replace(
            hidden=torch.zeros(count, width, dtype=written(hidden_dtype), device=device)
        )
    if wanted.weight:
        dtype = written(weight_dtype)
        into = into._replace(weight=torch.empty(vocabulary, width, dtype=dtype, device=device))
    if wanted.bias:
        into = into._replace(bias=torch.zeros(vocabulary, dtype=torch.float32, device=device))
    return into


def linear_nll_backward(
    problem: Problem,
    grad: Tensor,  # [N]
    saved: Saved,
    grad_weight: Tensor | None = None,  # [V, D], added to in place; a new one if None
) -> Gradients:
    """Gradients of ``sum(grad * loss)`` by what is wanted."""
    inputs, wanted = Inputs.of(problem), problem.wanted
    hidden, weight = problem.hidden, problem.weight
    own = grad_weight if wanted.weight else None
    types = (problem.operand, torch.float32)
    adds = own is not None and own.dtype in types and rows_contiguous(own) is own
    new = wanted._replace(weight=wanted.weight and not adds)
    into = gradient_places(inputs, new, hidden.dtype, weight.dtype)
    if adds:
        into = into._replace(weight=own)
    known = KnownRows(saved.lse, saved.lse_low, saved.nll, inputs.rows.mask(grad.float()))
    if problem.settings.gradient == "sampled":
        sampled_gradients(inputs, known, saved, into, adds=adds)
    else:
        recompute(inputs, known, None, into, adds=adds)
    result = into
    if into.hidden is not None:
        result = result._replace(hidden=into.hidden.to(hidden.dtype))
    if into.weight is not None and not adds:
        made = into.weight.to(weight.dtype)
        result = result._replace(weight=made if own is None else own.add_(made))
    return result
