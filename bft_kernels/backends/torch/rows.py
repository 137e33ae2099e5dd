"""Which rows of the input take part."""

from __future__ import annotations

import torch
from torch import Tensor


def count_is_known(device_type: str) -> bool:
    """Whether the host can count rows without waiting for the device."""
    return device_type == "cpu"


class LabelledRows:
    """The rows that carry a label.

    On a CPU ignored rows are dropped, so they cost nothing. On an accelerator their number is
    not known without waiting for the device: there they stay, as rows of zeros whose results are
    masked.

    Attributes:
        count: rows that are computed.
        labelled: ``[N]`` bool.
        copies: whether :meth:`take` copies rows, where it could otherwise give a view.
    """

    def __init__(self, target: Tensor, ignore_index: int) -> None:
        self.labelled = target != ignore_index
        self.index: Tensor | None = None
        self.masked = not count_is_known(target.device.type)
        if not self.masked:
            index = self.labelled.nonzero().squeeze(1)
            if index.numel() < target.numel():
                self.index = index
        self.count = target.numel() if self.index is None else self.index.numel()
        self.total = target.numel()
        self.copies = self.masked or self.index is not None  # whether take() does

    def positions(self, first: int, stop: int) -> Tensor:
        """Positions in the flattened input, int64."""
        if self.index is None:
            return torch.arange(first, stop, dtype=torch.int64, device=self.labelled.device)
        return self.index[first:stop]

    def take(self, values: Tensor, first: int, stop: int) -> Tensor:
        """``values[rows[first:stop]]`` of ``values [N, ...]``, zeros in place of ignored rows."""
        if self.index is not None:
            return values[self.index[first:stop]]
        part = values[first:stop]
        if not self.masked:
            return part
        mask = self.labelled[first:stop]
        mask = mask.view(-1, *[1] * (part.dim() - 1))
        return torch.where(mask, part, part.new_zeros(()))  # the scalar 0 would widen a bool

    def spread(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """``[count, ...] -> [N, ...]``, zeros where ignored."""
        values = values if dtype is None else values.to(dtype)
        if self.index is not None:
            full = values.new_zeros(self.total, *values.shape[1:])
            return full.index_copy_(0, self.index, values)
        if self.masked:
            mask = self.labelled.view(-1, *[1] * (values.dim() - 1))
            return torch.where(mask, values, torch.zeros_like(values))
        return values
