"""Which rows take part, known on the device only.

A host that counts them would wait for the device. So labelled rows are listed first, their number
stays on the device, and programs whose rows lie past it return at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class DeviceRows:
    """Labelled rows, in order, and how many there are."""

    order: Tensor  # [N] int64, positions of the labelled rows, then of the others
    count: Tensor  # [1] int64
    labelled: Tensor  # [N] bool

    @staticmethod
    def of(target: Tensor, ignore_index: int) -> DeviceRows:
        return DeviceRows.chosen(target != ignore_index)

    def spread(self, values: Tensor) -> Tensor:
        """``values [N]`` by labelled row, of which the first ``count`` count, by position."""
        return self.mask(torch.empty_like(values).index_copy_(0, self.order, values))

    @staticmethod
    def chosen(among: Tensor) -> DeviceRows:
        """The rows where ``among [N]`` is true, in the place of the labelled."""
        # A stable sort of one bit: rows stay in order, and nothing waits.
        order = torch.sort(among.to(torch.uint8), descending=True, stable=True).indices
        return DeviceRows(order, among.sum().reshape(1), among)

    def mask(self, values: Tensor) -> Tensor:
        """``values [N]``, 0 where ignored."""
        return torch.where(self.labelled, values, torch.zeros_like(values))


class RowValues(NamedTuple):
    """What the backward knows of each row, ``[N]`` float32 each."""

    lse: Tensor
    lse_low: Tensor  # or [0]
    nll: Tensor
    grad: Tensor  # upstream, 0 where ignored
