"""Documents in a batch: their boundaries, and where their labelled tokens lie.

Names of weights call a document a sequence. The boundaries are ``cu_seqlens [S + 1]``: cumulative
lengths over all flattened positions, from 0 to the number of positions. Documents may be empty.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bft_kernels.checks import check_capture, check_cu_seqlens, check_tensor


def boundaries_beside(cu_seqlens: Tensor, device: torch.device) -> Tensor:
    """``cu_seqlens`` as int64 on ``device``.

    Raises:
        RuntimeError: ``cu_seqlens`` would have to be copied while a CUDA graph is captured.
    """
    if cu_seqlens.device != device:
        check_capture(
            device,
            f"cu_seqlens: got a tensor on {cu_seqlens.device}",
            f"one on {device}: a replay would read freed memory. Move it there before the "
            "capture; rows of equal length need none",
        )
    return cu_seqlens.to(device, torch.int64, non_blocking=True)


def shift_labels(
    labels: Tensor, cu_seqlens: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """Aligns next-token labels with hidden states: ``target[..., t] = labels[..., t + 1]``.

    The last position of each row has nothing to predict and is ignored. With ``cu_seqlens`` the
    last position of each document is ignored too, so that a document's first token is never
    predicted from the document before it.

    Args:
        labels: ``[..., T]`` int64; ``[T]`` is one row.
        cu_seqlens: ``[S + 1]`` int32 or int64 over all flattened positions, on the device of
            ``labels`` or on the CPU.
        ignore_index: fills the positions without a target.

    Returns:
        ``target [..., T]`` int64, on the device of ``labels``.

    Raises:
        TypeError, ValueError: an argument is out of its domain; the message names it. The values of
            ``cu_seqlens`` are checked on the CPU only.
        RuntimeError: ``cu_seqlens`` would have to be copied while a CUDA graph is captured.
    """
    shape = labels.shape if isinstance(labels, Tensor) and labels.dim() else ("B", "T")
    check_tensor("labels", labels, shape, (torch.int64,))
    target = torch.full_like(labels, ignore_index)
    target[..., :-1] = labels[..., 1:]
    if cu_seqlens is None:
        return target
    check_cu_seqlens(cu_seqlens, labels.numel(), labels.device)
    position = torch.arange(labels.numel(), dtype=torch.int64, device=labels.device)
    ends = (boundaries_beside(cu_seqlens, labels.device) - 1).contiguous()
    found = ends[torch.searchsorted(ends, position).clamp(max=ends.numel() - 1)] == position
    return target.masked_fill(found.view_as(target), ignore_index)


def cu_seqlens_from_position_ids(position_ids: Tensor) -> Tensor:
    """Document boundaries of packed rows, whose ``position_ids`` restart at each document.

    A document starts at the beginning of each row and wherever a position is not one more than the
    position before it. Padding becomes documents of its own, which hold no labels.

    Args:
        position_ids: ``[B, T]`` int32 or int64.

    Returns:
        ``cu_seqlens [S + 1]`` int64 over the flattened positions, on the device of the argument. On
        a CPU ``S`` is the number of documents; elsewhere ``S = B * T``, filled up with empty
        documents, so that the host need not wait for the count.

    Raises:
        TypeError, ValueError: the argument has another type, shape or dtype.
    """
    check_tensor("position_ids", position_ids, ("B", "T"), (torch.int32, torch.int64))
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return _cu_seqlens_from_starts(starts)


def cu_seqlens_from_attention_mask(attention_mask: Tensor) -> Tensor:
    """Document boundaries from a mask.

    The mask is 0 for padding. Elsewhere it is 1, or the document's number (1, 2, ...).

    Args:
        attention_mask: ``[B, T]`` bool, int32 or int64.

    Returns:
        ``cu_seqlens [S + 1]`` int64, as in :func:`cu_seqlens_from_position_ids`.

    Raises:
        TypeError, ValueError: the argument has another type, shape or dtype.
    """
    check_tensor(
        "attention_mask", attention_mask, ("B", "T"), (torch.bool, torch.int32, torch.int64)
    )
    starts = torch.ones_like(attention_mask, dtype=torch.bool)
    starts[:, 1:] = attention_mask[:, 1:] != attention_mask[:, :-1]
    return _cu_seqlens_from_starts(starts)


def _cu_seqlens_from_starts(starts: Tensor) -> Tensor:
    count = starts.numel()
    starts = starts.flatten()
    if starts.device.type == "cpu":
        first = starts.nonzero().squeeze(1)
    else:
        position = torch.arange(count, dtype=torch.int64, device=starts.device)
        first = torch.where(starts, position, count).sort().values
    return torch.cat([first, first.new_full((1,), count)])


class Layout(NamedTuple):
    """Where labelled tokens go when the gaps of prompt and padding are closed."""

    labelled: Tensor  # [N] bool
    slot: Tensor  # [N] int64, place among the labelled tokens; meaningless where ignored
    sequence: Tensor  # [N] int64, the document of each position
    cu_labelled: Tensor  # [S + 1] int64 over the labelled tokens

    def compact(self, values: Tensor) -> Tensor:
        """``[N] -> [N]``: the labelled tokens come first, in order, and zeros follow them."""
        count = values.numel()
        slot = torch.where(self.labelled, self.slot, count)
        return values.new_zeros(count + 1).scatter(0, slot, values)[:count]

    def spread(self, compacted: Tensor) -> Tensor:
        """The inverse of :meth:`compact`; ignored positions get 0."""
        if compacted.numel() == 0:
            return compacted.new_zeros(self.slot.shape)
        slot = self.slot.clamp(0, compacted.numel() - 1)
        return torch.where(self.labelled, compacted[slot], 0.0)


def labelled_layout(labelled: Tensor, cu_seqlens: Tensor) -> Layout:
    """The layout of flattened positions ``labelled [N]`` in documents ``cu_seqlens [S + 1]``."""
    cu = boundaries_beside(cu_seqlens, labelled.device)
    through = labelled.long().cumsum(0)
    before = torch.nn.functional.pad(through, (1, 0))
    position = torch.arange(labelled.numel(), dtype=torch.int64, device=labelled.device)
    sequence = torch.searchsorted(cu[1:].contiguous(), position, right=True)
    return Layout(labelled, through - 1, sequence, before[cu])


def token_scales(
    labelled: Tensor,  # [N] bool
    layout: Layout | None,
    num_items: Tensor | None,  # []
    dtype: torch.dtype,
) -> Tensor:  # [N]
    """The factor of each token's weight and loss; 0 where ignored.

    With a ``layout`` of ``labelled`` it is ``1 / (T_b B)``, for ``T_b`` labels in the token's
    document and ``B`` documents with labels. Without one it is 1 over the number of labels.
    ``num_items`` takes the place of ``B``, or of that number.
    """
    if layout is not None:
        lengths = layout.cu_labelled.diff()
        scale = labelled.to(dtype)
        if lengths.numel():
            scale = scale / lengths.clamp_min(1)[layout.sequence].to(dtype)
        count = (lengths > 0).sum()
    else:
        scale, count = labelled.to(dtype), labelled.sum()
    scale = scale / (count.clamp_min(1) if num_items is None else num_items)
    return torch.where(labelled, scale, 0.0)  # num_items is 0 in a step without labels
