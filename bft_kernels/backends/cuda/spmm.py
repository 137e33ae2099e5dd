"""The sampled gradient from its lists: ``dH`` row by row, ``dW`` column by column.

The backward looks at each listed column once: it fetches that row of ``weight`` and, where the list
came without values, forms the logit again and decides by the final lse; it adds to ``dH`` while the
row is in registers. What is kept is sorted by column for ``dW``. Nothing depends on the order in
which blocks run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bft_kernels.backends.common.inputs import Inputs
from bft_kernels.backends.common.rows import KnownRows
from bft_kernels.backends.cuda.inputs import operands_of
from bft_kernels.backends.cuda.native import _cuda, launch
from bft_kernels.results import Gradients, Saved

# What sorting takes, bytes an entry: keys and entries, and both once more in order.
_SORTING_BYTES = 24


def spmm(inputs: Inputs, known: KnownRows, saved: Saved, into: Gradients, *, adds: bool) -> None:
    """``dH = S @ W`` and ``dW = S.T @ H`` of the listed entries, and the sums ``db``.

    With ``adds`` ``dW`` is added to, otherwise written; ``db`` is added to.
    """
    columns, device = saved.csr_columns, saved.csr_columns.device
    wants_entries = into.weight is not None or into.bias is not None
    places = columns.numel() if wants_entries else 0
    keys = torch.full((places,), inputs.shape[1], dtype=torch.int32, device=device)
    entries = torch.empty(places, dtype=torch.int64, device=device)
    lists = {"offsets": saved.csr_offsets, "columns": columns, "values": saved.csr_values}
    launch(
        _cuda.spmm_hidden,
        {**known._asdict(), "seed": inputs.call.seed, **lists},
        {"keys": keys, "packed": entries, "grad_hidden": into.hidden},
        problem=operands_of(inputs),
        eps=inputs.settings.eps,
        capacity=columns.numel(),
        is_float32=into.hidden is not None and into.hidden.dtype == torch.float32,
    )
    # As many at a time as the budget sorts.
    step = max(1, inputs.call.buffer_bytes // _SORTING_BYTES)
    for first in range(0, places, step):
        part = slice(first, min(first + step, places))
        _spmm_weight(inputs, keys[part], entries[part], into, adds or first > 0)


def _spmm_weight(
    inputs: Inputs, keys: Tensor, entries: Tensor, into: Gradients, adds: bool
) -> None:
    places, vocabulary, device = keys.numel(), inputs.shape[1], keys.device
    sorted_keys, sorted_entries = torch.empty_like(keys), torch.empty_like(entries)
    size = _cuda.sort_bytes(places, vocabulary)
    temporary = torch.empty(size, dtype=torch.uint8, device=device)
    launch(
        _cuda.sort_entries,
        {"keys": keys, "packed": entries},
        {"sorted_keys": sorted_keys, "sorted_packed": sorted_entries, "temporary": temporary},
        temporary_bytes=size,
        E=places,
        V=vocabulary,
    )
    starts = torch.empty(vocabulary + 1, dtype=torch.int64, device=device)
    reads = {"sorted_keys": sorted_keys}
    launch(_cuda.column_starts, reads, {"starts": starts}, E=places, V=vocabulary)
    launch(
        _cuda.spmm_weight,
        {"starts": starts, "packed": sorted_entries},
        {"grad_weight": into.weight, "grad_bias": into.bias},
        problem=operands_of(inputs),
        stride_gv=0 if into.weight is None else into.weight.stride(0),
        is_float32=into.weight is not None and into.weight.dtype == torch.float32,
        adds=adds,
    )
