"""The core op: its forward and its backward, from the kernels of the other modules."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bft_kernels.backends.gpu.inputs import rows_contiguous
from bft_kernels.backends.gpu.lists import capacity_for, offsets_of, overflowed
from bft_kernels.backends.gpu.rows import DeviceRows, RowValues
from bft_kernels.backends.torch.forward import squared_norms
from bft_kernels.backends.triton.chunked import linear_nll_unit, run_chunks
from bft_kernels.backends.triton.forward import run_tiles
from bft_kernels.backends.triton.gather import gather_hidden, gather_weight
from bft_kernels.backends.triton.inputs import Inputs
from bft_kernels.backends.triton.recompute import recompute
from bft_kernels.config import CoreConfig, storage
from bft_kernels.plan import takes_chunks
from bft_kernels.results import Forward, Gradients, Saved, Wanted


def linear_nll(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [N]
    bias: Tensor | None,  # [V]
    seed: Tensor | None,  # []
    config: CoreConfig,
) -> Forward:
    """Losses and statistics of every labelled row, and the residual that ``config`` asks for."""
    if config.residual == "unit":
        return _with_unit(hidden, weight, target, bias, config)
    inputs = Inputs.of(hidden, weight, target, bias, config)
    count, vocabulary, width = inputs.shape

    def per_row(wanted: bool, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(count if wanted else 0, dtype=dtype, device=hidden.device)

    results = {
        "loss": per_row(True),
        "nll": per_row(True),
        "lse": per_row(True),
        "lse_low": per_row(config.residual == "recompute"),
        "entropy": per_row(config.statistics),
        "correct": per_row(config.statistics, torch.bool),
    }
    sampled = config.residual == "entries"
    capacity = capacity_for(count, vocabulary, config.eps) if sampled else 0
    chunked = takes_chunks(count, vocabulary, config.max_buffer_bytes)
    results |= {
        "variance": per_row(config.variance),
        "hidden_variance": per_row(config.hidden_variance),
        "counts": per_row(sampled, torch.int64),
        "columns": torch.empty(capacity, dtype=torch.int32, device=hidden.device),
        "values": torch.empty(
            capacity if chunked else 0, dtype=torch.float32, device=hidden.device
        ),
    }
    norms = None
    if config.hidden_variance:
        norms = squared_norms(inputs.weight, torch.float32, config.max_buffer_bytes)
    if chunked:
        run_chunks(inputs, seed, norms, results)
    else:
        run_tiles(inputs, seed, norms, results)
    return Forward(
        **{name: results[name] for name in Forward._fields if name in results},
        unit=hidden.new_empty(0, width, dtype=storage(hidden.dtype)),
        entry_offsets=offsets_of(results["counts"]) if sampled else results["counts"],
        entry_columns=results["columns"],
        entry_values=results["values"],
    )


def _with_unit(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, config: CoreConfig
) -> Forward:
    """The forward that makes ``dH`` for unit upstream gradient too, in two products."""
    out, loss = linear_nll_unit(hidden, weight, target, bias, config)

    def absent(dtype: torch.dtype = torch.float32) -> Tensor:
        return hidden.new_empty(0, dtype=dtype)

    return Forward(
        loss=loss,
        nll=out.nll,
        lse=out.lse,
        lse_low=absent(),
        entropy=out.entropy,
        correct=out.correct,
        variance=absent(),
        hidden_variance=absent(),
        unit=out.grad_hidden,
        entry_offsets=absent(torch.int64),
        entry_columns=absent(torch.int32),
        entry_values=absent(),
    )


def linear_nll_backward(
    grad: Tensor,  # [N]
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [N]
    bias: Tensor | None,  # [V]
    saved: Saved,
    config: CoreConfig,
    wanted: Wanted,
    grad_weight: Tensor | None = None,  # [V, D], added to in place; a new one if None
) -> Gradients:
    """Gradients of ``sum(grad * loss)`` by what is wanted."""
    inputs = Inputs.of(hidden, weight, target, bias, config)
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
    known = RowValues(saved.lse, saved.lse_low, saved.nll, grad)
    if config.residual == "entries":
        _sampled(inputs, known, saved, wanted, into, adds)
    else:
        recompute(inputs, known, None, wanted, into, adds=adds)
    if grad_weight is not None and own is not None and own is not grad_weight:
        return into._replace(weight=grad_weight.add_(own))
    return into


def _sampled(
    inputs: Inputs, known: RowValues, saved: Saved, wanted: Wanted, into: Gradients, adds: bool
) -> None:
    """The gradients of the listed entries, to which the rows whose entries found no room are added.

    ``adds``: whether ``dW`` is added to from the start.
    """
    assert saved.seed is not None
    offsets, columns, values = saved.entry_offsets, saved.entry_columns, saved.entry_values
    wants_entries = wanted.weight or wanted.bias
    listed = gather_hidden(
        inputs, known, saved.seed, offsets, columns, values, into.hidden, wants_entries
    )
    if wants_entries:
        gather_weight(inputs, listed, into, adds=adds)
    rest = DeviceRows.chosen(overflowed(offsets, columns.numel()))
    recompute(replace(inputs, rows=rest), known, saved.seed, wanted, into, adds=True)
