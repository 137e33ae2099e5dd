"""The sampled gradient from its lists: ``dH`` row by row, ``dW`` column by column.

The backward fetches the row of ``weight`` of each listed column once. If the list has no values, it
computes the logit again, and the final lse decides whether the entry is kept. It adds the row to
``dH`` while it is in registers. Kept entries are sorted by column for ``dW``. The order in which
thread blocks run changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bft_kernels.backends.common.inputs import Inputs
from bft_kernels.backends.common.rows import KnownRows
from bft_kernels.backends.cuda.inputs import operands_of
from bft_kernels.backends.cuda.native import _cuda, out, ptr, stream
from bft_kernels.results import Gradients, Saved

# The bytes that sorting takes for an entry: keys and entries, unsorted and sorted.
_SORTING_BYTES = 24


def spmm(inputs: Inputs, known: KnownRows, saved: Saved, into: Gradients, *, adds: bool) -> None:
    """``dH = S @ W`` and ``dW = S.T @ H`` of the listed entries, and the sums ``db``.

    With ``adds``, ``dW`` is added to; otherwise it is written. ``db`` is added to.
    """
    columns, device = saved.csr_columns, saved.csr_columns.device
    wants_entries = into.weight is not None or into.bias is not None
    places = columns.numel() if wants_entries else 0
    keys = torch.full((places,), inputs.shape[1], dtype=torch.int32, device=device)
    entries = torch.empty(places, dtype=torch.int64, device=device)
    _cuda.spmm_hidden(
        problem=operands_of(inputs),
        lse_ptr=ptr(known.lse),
        nll_ptr=ptr(known.nll),
        grad_ptr=ptr(known.grad),
        seed_ptr=ptr(inputs.call.seed),
        eps=inputs.settings.eps,
        offsets_ptr=ptr(saved.csr_offsets),
        columns_ptr=ptr(columns),
        values_ptr=ptr(saved.csr_values),
        capacity=columns.numel(),
        keys_ptr=out(keys),
        packed_ptr=out(entries),
        grad_hidden_ptr=out(into.hidden),
        is_float32=into.hidden is not None and into.hidden.dtype == torch.float32,
        stream=stream(),
    )
    # As many entries at a time as the budget has room to sort.
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
    _cuda.sort_entries(
        keys_ptr=ptr(keys),
        packed_ptr=ptr(entries),
        E=places,
        V=vocabulary,
        sorted_keys_ptr=out(sorted_keys),
        sorted_packed_ptr=out(sorted_entries),
        temporary_ptr=out(temporary),
        temporary_bytes=size,
        stream=stream(),
    )
    starts = torch.empty(vocabulary + 1, dtype=torch.int64, device=device)
    _cuda.column_starts(
        sorted_keys_ptr=ptr(sorted_keys),
        E=places,
        V=vocabulary,
        starts_ptr=out(starts),
        stream=stream(),
    )
    _cuda.spmm_weight(
        problem=operands_of(inputs),
        starts_ptr=ptr(starts),
        packed_ptr=ptr(sorted_entries),
        grad_weight_ptr=out(into.weight),
        stride_gv=0 if into.weight is None else into.weight.stride(0),
        is_float32=into.weight is not None and into.weight.dtype == torch.float32,
        adds=adds,
        grad_bias_ptr=out(into.bias),
        stream=stream(),
    )
