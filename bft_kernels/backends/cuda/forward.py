"""The forward: losses and statistics of every row that takes part, and bits of what may be kept."""

from __future__ import annotations

import torch
from torch import Tensor

from bft_kernels.backends.common.lse_bound import raise_bounds
from bft_kernels.backends.cuda import native
from bft_kernels.backends.cuda.inputs import Inputs
from bft_kernels.backends.cuda.native import _cuda, out, ptr, stream


def run_tiles(
    inputs: Inputs,
    results: dict[str, Tensor],
    first_row: int,
    rows: int,
    seed: Tensor | None = None,
    floors: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """One pass over the logits of the rows ``first_row`` to ``first_row + rows``.

    Args:
        inputs: of the call.
        results: ``[N]`` by the names of ``Forward``, or ``[0]``.
        first_row, rows: among those that take part, of which there may be fewer.
        seed: ``[]`` int64, for a mask.
        floors: ``[N]`` float32, lower bounds of lse, for a mask.
        mask: ``[rows, ceil(V / 32)]`` int32, where bits of the entries that may be kept go.
    """
    call, device = inputs.call, inputs.hidden.device
    splits, columns = splits_for(inputs, rows)
    sums = torch.empty(_cuda.FORWARD_SUMS * splits * rows, dtype=torch.float32, device=device)
    _cuda.linear_nll_forward(
        problem=inputs.operands,
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
        label_smoothing=call.settings.label_smoothing,
        z_loss=call.settings.z_loss,
        seed_ptr=ptr(seed),
        floor_ptr=ptr(floors),
        mask_ptr=out(mask),
        eps=call.settings.eps,
        stream=stream(),
    )


def splits_for(inputs: Inputs, rows: int) -> tuple[int, int]:
    """How many parts of the vocabulary a pass over ``rows`` rows has, and columns of each."""
    processors = native.processors(inputs.hidden.device)
    return _cuda.forward_splits(rows, inputs.shape[1], processors)


def find_floors(inputs: Inputs) -> Tensor:
    """``[N]`` float32, defined for rows that take part: lower bounds of lse."""
    floors = torch.empty(inputs.shape[0], dtype=torch.float32, device=inputs.hidden.device)
    _cuda.target_floor(problem=inputs.operands, floor_ptr=out(floors), stream=stream())
    return raise_bounds(floors, inputs)
