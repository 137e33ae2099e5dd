"""The tiled forward: losses and statistics of labelled rows, and lists of entries that may be kept.

Nothing depends on the order in which thread blocks run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bft_kernels.backends.common.csr import offsets_of
from bft_kernels.backends.common.inputs import Inputs
from bft_kernels.backends.common.lse_bound import raise_bounds
from bft_kernels.backends.common.tiles import candidate_masks
from bft_kernels.backends.cuda.certificate import certify
from bft_kernels.backends.cuda.inputs import operands_of, splits_of
from bft_kernels.backends.cuda.native import _cuda, out, ptr, stream
from bft_kernels.backends.cuda.recompute import TILE


def run_tiles(inputs: Inputs, results: dict[str, Tensor]) -> None:
    """See :meth:`bft_kernels.backends.common.on_device.Kernels.run_tiles`."""
    if inputs.call.saved == "entries":
        lse_bounds = find_bounds(inputs)
        for first, mask in candidate_masks(inputs, TILE):
            _forward(inputs, results, first, mask.shape[0], lse_bounds, mask)
            _list_candidates(inputs, mask, first, results)
    else:
        _forward(inputs, results, 0, inputs.shape[0])
    if inputs.call.variance:
        certify(inputs, results)


def _forward(
    inputs: Inputs,
    results: dict[str, Tensor],
    first_row: int,
    rows: int,
    lse_bounds: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """One pass over the logits of the rows ``first_row`` to ``first_row + rows``.

    Args:
        inputs: the inputs of the call.
        results: ``[N]`` by the names of ``Forward``, or ``[0]``.
        first_row, rows: the range of labelled rows; it may end past the last one.
        lse_bounds: ``[N]`` float32, lower bounds of lse; only with ``mask``.
        mask: ``[rows, ceil(V / 32)]`` int32, gets a bit for each entry that may be kept.
    """
    settings, device = inputs.settings, inputs.hidden.device
    splits, columns = splits_of(inputs, rows)
    sums = torch.empty(_cuda.FORWARD_SUMS * splits * rows, dtype=torch.float32, device=device)
    _cuda.linear_nll_forward(
        problem=operands_of(inputs),
        first_row=first_row,
        rows=rows,
        splits=splits,
        split_columns=columns,
        sums_ptr=out(sums),
        loss_ptr=out(results["loss"]),
        nll_ptr=out(results["nll"]),
        lse_ptr=out(results["lse"]),
        lse_low_ptr=out(results["lse_low"]),
        entropy_ptr=out(results["entropy"]),
        correct_ptr=out(results["correct"]),
        label_smoothing=settings.label_smoothing,
        z_loss=settings.z_loss,
        seed_ptr=ptr(None if mask is None else inputs.call.seed),
        lse_bound_ptr=ptr(lse_bounds),
        mask_ptr=out(mask),
        eps=settings.eps,
        stream=stream(),
    )


def find_bounds(inputs: Inputs) -> Tensor:
    """``[N]`` float32: lower bounds of lse, defined for labelled rows."""
    lse_bounds = torch.empty(inputs.shape[0], dtype=torch.float32, device=inputs.hidden.device)
    _cuda.target_bound(problem=operands_of(inputs), lse_bound_ptr=out(lse_bounds), stream=stream())
    return raise_bounds(lse_bounds, inputs)


def _list_candidates(
    inputs: Inputs, mask: Tensor, first_row: int, results: dict[str, Tensor]
) -> None:
    """Appends the columns of the bits of ``mask`` to ``columns``.

    Rows that end past the room have no list, and are computed again in the backward.
    """
    problem, rows = operands_of(inputs), mask.shape[0]
    _cuda.count_entries(
        problem=problem,
        first_row=first_row,
        rows=rows,
        mask_ptr=ptr(mask),
        counts_ptr=out(results["counts"]),
        stream=stream(),
    )
    offsets_of(results["counts"], out=results["offsets"])
    _cuda.list_entries(
        problem=problem,
        first_row=first_row,
        rows=rows,
        mask_ptr=ptr(mask),
        offsets_ptr=ptr(results["offsets"]),
        columns_ptr=out(results["columns"]),
        capacity=results["columns"].numel(),
        stream=stream(),
    )
