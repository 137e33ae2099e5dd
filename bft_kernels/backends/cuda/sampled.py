"""The sampled gradient: lists of columns from the forward's bits, and gathers over them.

The backward looks at each listed column once: it fetches that row of ``weight``, forms the logit
again and decides by the final lse; it adds to ``dH`` while the row is in registers. What is kept is
sorted by column for ``dW``. Nothing depends on the order in which blocks run.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bft_kernels.backends.common.csr import overflowed
from bft_kernels.backends.common.rows import DeviceRows, KnownRows
from bft_kernels.backends.cuda.forward import find_floors, run_tiles
from bft_kernels.backends.cuda.inputs import Inputs
from bft_kernels.backends.cuda.native import _cuda, out, ptr, stream
from bft_kernels.backends.cuda.recompute import TILE, recompute
from bft_kernels.results import Gradients, Saved

# What sorting takes, bytes an entry: keys and entries, and both once more in order.
_SORTING_BYTES = 24


def list_entries(
    inputs: Inputs, seed: Tensor, results: dict[str, Tensor], room: int
) -> tuple[Tensor, Tensor]:
    """The forward, and lists of what may be kept: ``offsets [N + 1]`` int64, ``columns [room]``.

    Rows that end past the room have no list, and are computed again in the backward.
    """
    call, (count, vocabulary, _) = inputs.call, inputs.shape
    device = inputs.hidden.device
    floors = find_floors(inputs)
    words = -(-vocabulary // 32)
    step = TILE * max(1, call.buffer_bytes // (4 * words) // TILE)
    mask = torch.empty(min(step, count), words, dtype=torch.int32, device=device)
    counts = torch.zeros(count, dtype=torch.int64, device=device)
    offsets = torch.zeros(count + 1, dtype=torch.int64, device=device)
    columns = torch.empty(room, dtype=torch.int32, device=device)
    temporary = torch.empty(_cuda.scan_bytes(count), dtype=torch.uint8, device=device)
    problem = inputs.operands
    for first in range(0, count, step):
        part = mask[: min(step, count - first)]
        rows = part.shape[0]
        run_tiles(inputs, results, first, rows, seed, floors, part)
        _cuda.count_entries(
            problem=problem,
            first_row=first,
            rows=rows,
            mask_ptr=ptr(part),
            counts_ptr=out(counts),
            stream=stream(),
        )
        _cuda.scan_counts(
            counts_ptr=ptr(counts),
            N=count,
            offsets_ptr=out(offsets),
            temporary_ptr=out(temporary),
            temporary_bytes=temporary.numel(),
            stream=stream(),
        )
        _cuda.list_entries(
            problem=problem,
            first_row=first,
            rows=rows,
            mask_ptr=ptr(part),
            offsets_ptr=ptr(offsets),
            columns_ptr=out(columns),
            capacity=room,
            stream=stream(),
        )
    return offsets, columns


def sampled_gradients(
    inputs: Inputs, known: KnownRows, saved: Saved, into: Gradients, *, adds: bool
) -> None:
    """Gradients of the listed entries, and of the rows whose entries found no room.

    ``adds``: whether ``dW`` is added to from the start. ``db`` is added to.
    """
    seed = inputs.call.seed
    assert seed is not None
    offsets, columns = saved.entry_offsets, saved.entry_columns
    room = columns.numel()
    if room > 0:
        _from_lists(inputs, known, saved, into, adds)
    elif into.weight is not None and not adds:
        into.weight.zero_()
    rest = replace(inputs, rows=DeviceRows.chosen(overflowed(offsets, room)))
    recompute(rest, known, seed, into, adds=True)


def _from_lists(
    inputs: Inputs, known: KnownRows, saved: Saved, into: Gradients, adds: bool
) -> None:
    offsets, columns = saved.entry_offsets, saved.entry_columns
    device, vocabulary = columns.device, inputs.shape[1]
    wants_entries = into.weight is not None or into.bias is not None
    places = columns.numel() if wants_entries else 0
    keys = torch.full((places,), vocabulary, dtype=torch.int32, device=device)
    entries = torch.empty(places, dtype=torch.int64, device=device)
    _cuda.gather_hidden(
        problem=inputs.operands,
        lse_ptr=ptr(known.lse),
        nll_ptr=ptr(known.nll),
        grad_ptr=ptr(known.grad),
        seed_ptr=ptr(inputs.call.seed),
        eps=inputs.call.settings.eps,
        offsets_ptr=ptr(offsets),
        columns_ptr=ptr(columns),
        capacity=columns.numel(),
        keys_ptr=out(keys),
        packed_ptr=out(entries),
        grad_hidden_ptr=out(into.hidden),
        wide=into.hidden is not None and into.hidden.dtype == torch.float32,
        stream=stream(),
    )
    if wants_entries:
        _gather_weight(inputs, keys, entries, into, adds)


def _gather_weight(
    inputs: Inputs, keys: Tensor, entries: Tensor, into: Gradients, adds: bool
) -> None:
    """``dW`` and ``db`` of the entries, as many at a time as the budget sorts."""
    places = keys.numel()
    step = max(1, inputs.call.buffer_bytes // _SORTING_BYTES)
    for first in range(0, places, step):
        part = slice(first, min(first + step, places))
        _gather_weight_of(inputs, keys[part], entries[part], into, adds or first > 0)


def _gather_weight_of(
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
    _cuda.gather_weight(
        problem=inputs.operands,
        starts_ptr=ptr(starts),
        packed_ptr=ptr(sorted_entries),
        grad_weight_ptr=out(into.weight),
        stride_gv=0 if into.weight is None else into.weight.stride(0),
        wide=into.weight is not None and into.weight.dtype == torch.float32,
        adds=adds,
        grad_bias_ptr=out(into.bias),
        stream=stream(),
    )
